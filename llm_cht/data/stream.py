"""Training batches from a source that is read while training.

The order is a function of (seed, epoch): the shards in an order drawn from it, the documents in order within a shard,
packed on the fly, epoch after epoch without a gap. So a position is a few numbers: the first document with unread
tokens, and how many of them are read. A resume enters the shard there and goes on with the very same sequences. A
shuffle buffer was rejected, since its content would have to be saved; shards should be many and shuffled beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_cht.data.order import permutation
from llm_cht.data.pack import Packing, fill
from llm_cht.data.split import Split
from llm_cht.data.tokenizer import encode
from llm_cht.errors import UserError

_CHUNK_DOCUMENTS = 32  # encoded at once


@dataclass(frozen=True)
class Packed:
    """How documents become sequences."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    packing: Packing
    pad: int


@dataclass(frozen=True)
class _Place:
    """A document of the endless line of documents."""

    epoch: int
    turn: int
    """shards of the epoch that are done"""
    document: int
    """number within the shard"""


class Stream:
    """Training batches in order; the same interface as ``Batches``, but every batch must follow the last."""

    def __init__(self, split: Split, how: Packed, seed: int) -> None:
        self._split, self._how, self._seed = split, how, seed
        self._enter({"next": 0, "offset": 0, "epoch": 0, "turn": 0, "document": 0})

    @property
    def num_shards(self) -> int:
        """Of the source."""
        return self._split.source.num_shards

    def batch(self, start: int, count: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Of samples start .. start + count - 1 of the run the ``rows``: ``input_ids`` and ``labels``, int64.

        Where a sequence starts depends on all documents before it: every rank reads and tokenizes the whole stream.

        Raises:
            UserError: a file is damaged, or a whole epoch fills no sequence.
        """
        assert start == self._next, (start, self._next)
        sequences = [self._sequence() for _ in range(count)][rows]
        self._next += count
        return fill(np.concatenate(sequences), np.array([*map(len, sequences)]), self._how.length, self._how.pad)

    def state_dict(self) -> dict[str, Any]:
        """The position as whole numbers."""
        place, _ = self._unread()
        return {"next": self._next, "offset": self._offset, **asdict(place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._enter(state)

    def _enter(self, state: dict[str, Any]) -> None:
        self._next, self._offset = state["next"], state["offset"]
        self._line = self._documents(_Place(state["epoch"], state["turn"], state["document"]))
        self._document: tuple[_Place, np.ndarray] | None = None

    def _sequence(self) -> np.ndarray:
        if self._how.packing == "pad":
            _, tokens = self._unread()
            self._document = None
            return tokens[: self._how.length]
        pieces: list[np.ndarray] = []
        missing = self._how.length
        while missing:
            _, tokens = self._unread()
            pieces.append(tokens[self._offset : self._offset + missing])
            missing -= len(pieces[-1])
            self._offset += len(pieces[-1])
            if self._offset == len(tokens):
                self._document, self._offset = None, 0
        return np.concatenate(pieces)

    def _unread(self) -> tuple[_Place, np.ndarray]:
        """The first document with unread tokens."""
        if self._document is None:
            self._document = next(self._line)
        return self._document

    def _documents(self, start: _Place) -> Iterator[tuple[_Place, np.ndarray]]:
        """Training documents and their tokens from ``start`` on, without end."""
        for epoch in itertools.count(start.epoch):
            order = permutation(self._seed, epoch, self.num_shards)
            first = start if epoch == start.epoch else _Place(epoch, 0, 0)
            num_tokens = 0
            for turn in range(first.turn, len(order)):
                skip = first.document if turn == first.turn else 0
                for document, tokens in self._shard(int(order[turn]), skip):
                    num_tokens += len(tokens)
                    yield _Place(epoch, turn, document), tokens
            needed = self._how.length if self._how.packing == "pack" else 1
            if first == _Place(epoch, 0, 0) and num_tokens < needed:
                raise no_sequence("train", self._split.source.place, num_tokens, self._how.length)

    def _shard(self, shard: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers and tokens of the training documents of one shard, from number ``start`` on."""
        numbered = enumerate(self._split.source.documents(shard, start), start)
        train = ((number, text) for number, text in numbered if self._split.side(text) == "train")
        while chunk := list(itertools.islice(train, _CHUNK_DOCUMENTS)):
            numbers, texts = zip(*chunk, strict=True)
            yield from zip(numbers, encode(self._how.tokenizer, list(texts)), strict=True)


def no_sequence(side: Literal["train", "validation"], place: str, num_tokens: int, length: int) -> UserError:
    """The error for a side that fills no sequence; ``place`` is what messages call its source."""
    name, remedy = {
        "train": ("training", "add text"),
        "validation": ("validation", "raise `data.validation_fraction`, set `data.validation`"),
    }[side]
    return UserError(
        f"the {name} documents of {place} have {num_tokens} tokens and one sequence needs {length}; {remedy}, or lower "
        "`data.sequence_length`"
    )
