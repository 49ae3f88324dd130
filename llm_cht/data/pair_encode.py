"""Sentence pairs to tokens, with the filters of length and ratio.

Chunks of pairs are encoded at once, so that the threads of the tokenizer have work; what is kept goes straight to disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm_cht.data.pair_files import Pair, PairSource
from llm_cht.data.pair_store import PairCounts, PairWriter, write_texts
from llm_cht.data.pair_vocabulary import Encoder
from llm_cht.errors import UserError

_CHUNK = 20_000  # pairs
_SAMPLES = 2


@dataclass(frozen=True)
class Limits:
    """What a training pair must keep to."""

    length: int
    """tokens of a side, end token included"""
    ratio: float | None
    """tokens of the longer side over those of the shorter, end tokens left out"""


@dataclass
class Report:
    """What became of a split."""

    counts: PairCounts = field(default_factory=PairCounts)
    longest_side: int = 0
    """tokens"""
    largest: int = 0
    """tokens of both sides of the largest pair"""
    largest_place: str = ""
    samples: list[Pair] = field(default_factory=list)
    """the first kept pairs, as they were read"""

    def check_budget(self, batch_tokens: int) -> None:
        """Refuse a budget of tokens that some pair alone is above.

        Raises:
            UserError: names the largest pair.
        """
        if batch_tokens < self.largest:
            raise UserError(
                f"`train.batch_tokens` = {batch_tokens}: the pair at {self.largest_place} alone has {self.largest} "
                "tokens on both sides; raise it, or lower `pairs.max_length`"
            )


class SplitEncoder:
    """Encodes the pairs of one split, all of ``source``, into the folder ``path``; add pairs, then close.

    ``strict``: a pair that training would leave out is an error.
    """

    def __init__(self, path: Path, encoder: Encoder, limits: Limits, source: PairSource, strict: bool) -> None:
        self.report = Report()
        self._path, self._encoder, self._limits = path, encoder, limits
        self._source, self._strict = source, strict
        self._writer = PairWriter(path, encoder.sizes)
        self._waiting: list[tuple[int, Pair]] = []
        self._texts: list[Pair] | None = None if path.name == "train" else []

    def add(self, number: int, pair: Pair) -> None:
        """Take one pair.

        Raises:
            UserError: ``strict``, and a pair cannot be used.
        """
        self._waiting.append((number, pair))
        if len(self._waiting) == _CHUNK:
            self._flush()

    def close(self) -> Report:
        """Write what is waiting, and for validation and test the sentences."""
        self._flush()
        self._writer.close()
        if self._texts is not None:
            write_texts(self._path.with_suffix(".json"), self._texts)
        return self.report

    def _flush(self) -> None:
        if not self._waiting:
            return
        tokens = [self._encoder([pair[side] for _, pair in self._waiting], side) for side in (0, 1)]
        lengths = np.array([[len(sentence) for sentence in sentences] for sentences in tokens])
        kept = self._filtered(lengths)
        for side in (0, 1):
            self._writer.add([tokens[side][place] for place in kept], lengths[side, kept], side)
        self._account(lengths[:, kept], [self._waiting[place] for place in kept])
        self._waiting = []

    def _filtered(self, lengths: np.ndarray) -> np.ndarray:
        """Places of the pairs to keep; the others are counted."""
        words = lengths - np.array(self._encoder.blank)[:, None]
        empty = words.min(0) < 1
        long = ~empty & (lengths.max(0) > self._limits.length)
        uneven = np.zeros_like(empty)
        if self._strict:
            for bad, what in ((empty, "no text that the vocabulary could read"), (long, "")):
                if bad.any():
                    raise self._refused(int(bad.argmax()), lengths, what)
        elif self._limits.ratio is not None:
            uneven = ~empty & ~long & (words.max(0) > self._limits.ratio * words.min(0))
        counts = self.report.counts
        counts.read += len(empty)
        counts.dropped_empty += int(empty.sum())
        counts.dropped_long += int(long.sum())
        counts.dropped_ratio += int(uneven.sum())
        return np.flatnonzero(~(empty | long | uneven))

    def _refused(self, place: int, lengths: np.ndarray, what: str) -> UserError:
        side = int(lengths[0, place] < lengths[1, place]) ^ bool(what)
        line = self._source.where(self._waiting[place][0], side)
        name = f"`pairs.{self._path.name}`"
        if what:
            return UserError(f"{line}: {what}, in {name}; delete the pair, or correct the line")
        return UserError(
            f"{line}: {lengths[side, place]} tokens in {name}, more than `pairs.max_length` = {self._limits.length}; "
            "raise it, or shorten the line"
        )

    def _account(self, lengths: np.ndarray, kept: list[tuple[int, Pair]]) -> None:
        if not kept:
            return
        report, counts = self.report, self.report.counts
        counts.kept += len(kept)
        counts.source_tokens += int(lengths[0].sum())
        counts.target_tokens += int(lengths[1].sum())
        report.longest_side = max(report.longest_side, int(lengths.max()))
        totals = lengths.sum(0)
        if totals.max() > report.largest:
            report.largest = int(totals.max())
            report.largest_place = self._source.where(kept[int(totals.argmax())][0], 0)
        report.samples = [*report.samples, *(pair for _, pair in kept)][:_SAMPLES]
        if self._texts is not None:
            self._texts += [pair for _, pair in kept]
