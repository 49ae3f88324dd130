"""Which documents train and which validate; no text is on both sides.

A document is held out by a hash of its text, not by its number: equal documents fall on one side, the choice is the
same for every seed, and it can be made on a stream. Where validation has a source of its own, training documents that
also stand there are left out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llm_cht.data.sources import Source

Side = Literal["train", "validation", "shared", "blank"]


@dataclass(frozen=True)
class Split:
    """The two sides of ``source``, or ``source`` against the documents of ``own``."""

    source: Source
    own: Source | None
    fraction: float
    """of the documents of ``source`` that are held out where there is no ``own``"""
    head: int | None
    """documents of ``source`` that preparation looks at; None: all"""

    @cached_property
    def own_digests(self) -> frozenset[bytes]:
        """Of the documents of ``own``."""
        return frozenset(_digest(text) for text in _all_documents(self.own)) if self.own else frozenset()

    def side(self, text: str) -> Side:
        """Where a document of ``source`` belongs; `shared` stands in ``own`` too, and is left out as `blank` is."""
        if not text.strip():
            return "blank"
        digest = _digest(text)
        if self.own:
            return "shared" if digest in self.own_digests else "train"
        return "validation" if int.from_bytes(digest[:8], "big") < self.fraction * 2**64 else "train"

    def documents(self) -> Iterator[tuple[Side, str]]:
        """What preparation reads: all of ``own`` for validation, then ``source``."""
        own = _all_documents(self.own) if self.own else iter(())
        return itertools.chain((("validation", text) for text in own if text.strip()), self.source_documents())

    def source_documents(self) -> Iterator[tuple[Side, str]]:
        """The documents of ``source`` up to ``head``."""
        for text in itertools.islice(_all_documents(self.source), self.head):
            yield self.side(text), text


def _all_documents(source: Source) -> Iterator[str]:
    return itertools.chain.from_iterable(source.documents(shard) for shard in range(source.num_shards))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
