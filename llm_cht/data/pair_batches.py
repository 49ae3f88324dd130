"""Batches of sentence pairs by a budget of tokens, the same for any number of ranks.

The cost of a batch is what the model computes on: rows * (longest source + longest target), padding included. An epoch
is a permutation of the pairs, cut into pools of about a hundred batches; a pool is sorted by length and cut greedily,
and the batches of all pools are shuffled. So pairs of a batch have nearly one length and still meet other pairs in
every epoch. All of it is a function of (seed, epoch), and a position is two whole numbers. Sorting whole epochs was
rejected: the same pairs of rare lengths would meet every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llm_cht.data.order import permutation
from llm_cht.data.pair_store import IGNORED, PairStore

_POOL_BATCHES = 100
_SHUFFLE = 1  # a stream of random numbers apart from the one that draws the pairs


@dataclass(frozen=True)
class PairTokens:
    """What a whole global batch holds, padding left out; S_i and T_i are the lengths of pair i, end tokens included."""

    pairs: int
    source: int
    """sum of S_i"""
    target: int
    """sum of T_i: labels"""
    source_squares: int
    """sum of S_i ** 2"""
    target_squares: int
    """sum of T_i ** 2"""
    products: int
    """sum of S_i * T_i"""


class TokenBatches:
    """Training batches in order, without end; ``pad`` fills the inputs."""

    def __init__(self, store: PairStore, pad: int, batch_tokens: int, seed: int) -> None:
        self._store, self._pad, self._budget, self._seed = store, pad, batch_tokens, seed
        self._number, self._batches = -1, [np.zeros(0, dtype=np.int64)]
        self._epoch, self._batch = 0, 0

    def __len__(self) -> int:
        """Batches of epoch 0."""
        return len(self.epoch(0))

    def epoch(self, number: int) -> list[np.ndarray]:
        """Pair numbers of each batch of an epoch."""
        if number != self._number:
            self._number, self._batches = number, self._cut(number)
        return self._batches

    def next(self, rank: int, world: int, passes: int) -> tuple[list[dict[str, Tensor]], PairTokens]:
        """The next global batch: the ``passes`` parts of this rank, and what the whole of it holds.

        Its rows are dealt out to ``world * passes`` parts: ``input_ids`` and ``attention_mask`` (rows, longest source),
        ``labels`` (rows, longest target), int64. A part that gets no row holds the first row of the batch with labels
        of -100 only, so that all ranks run the same number of passes.
        """
        if self._batch == len(self.epoch(self._epoch)):
            self._epoch, self._batch = self._epoch + 1, 0
        numbers = self.epoch(self._epoch)[self._batch]
        self._batch += 1
        parts = [numbers[turn * world + rank :: world * passes] for turn in range(passes)]
        return [self._part(part, numbers) for part in parts], self._tokens(numbers)

    def padding(self) -> float:
        """Share of epoch 0 that is padding."""
        sources, targets = self._store.lengths
        batches = self.epoch(0)
        total = sum(len(batch) * int(sources[batch].max() + targets[batch].max()) for batch in batches)
        return 1 - int(sources.sum() + targets.sum()) / total

    def state_dict(self) -> dict[str, int]:
        """The position: epoch, and batches of it that are done."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken."""
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _part(self, part: np.ndarray, batch: np.ndarray) -> dict[str, Tensor]:
        tensors = self._store.tensors(part if len(part) else batch[:1], self._pad)
        if not len(part):
            tensors["labels"].fill_(IGNORED)
        return tensors

    def _tokens(self, batch: np.ndarray) -> PairTokens:
        sources, targets = (lengths[batch] for lengths in self._store.lengths)
        products = ((sources**2).sum(), (targets**2).sum(), (sources * targets).sum())
        return PairTokens(len(batch), int(sources.sum()), int(targets.sum()), *map(int, products))

    def _cut(self, epoch: int) -> list[np.ndarray]:
        count = len(self._store)
        sources, targets = self._store.lengths
        tokens = int(sources.sum() + targets.sum())
        num_pools = max(1, round(tokens / (_POOL_BATCHES * self._budget)))
        batches = []
        for pool in np.array_split(permutation(self._seed, epoch, count), num_pools):
            batches += cut(pool[by_length(sources[pool], targets[pool])], sources, targets, self._budget)
        return [batches[place] for place in permutation(self._seed, epoch, len(batches), _SHUFFLE)]


class HeldOut:
    """Pairs of validation or test, and their sentences as they were read."""

    def __init__(self, store: PairStore, pad: int, texts: tuple[list[str], list[str]]) -> None:
        self._store, self._pad = store, pad
        self.sources, self.references = texts

    def __len__(self) -> int:
        return len(self._store)

    def batches(self, batch_tokens: int) -> Iterator[dict[str, Tensor]]:
        """All pairs in batches of pairs of similar length, always the same.

        A batch is within the budget, but holds one pair at least. Shapes are those of ``TokenBatches.next``.
        """
        sources, targets = self._store.lengths
        for batch in cut(by_length(sources, targets), sources, targets, batch_tokens):
            yield self._store.tensors(batch, self._pad)


def by_length(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The order of pairs by the longer side, and among equals by the other one, to and fro; equal ones stay in order.

    Neighbours are then alike on both sides: half the padding of the order by both sides' sum.
    """
    longer = np.maximum(sources, targets)
    return np.lexsort((np.where(longer % 2, targets - sources, sources - targets), longer))


def cut(order: np.ndarray, sources: np.ndarray, targets: np.ndarray, budget: int) -> list[np.ndarray]:
    """``order`` (pair numbers) in consecutive batches of rows * (longest source + longest target) <= ``budget``.

    ``sources`` and ``targets`` are the lengths of all pairs. A batch is as large as it can be, and one pair at least.
    """
    sources, targets = sources[order], targets[order]
    batches, start = [], 0
    while start < len(order):
        most = max(1, budget // int(sources[start] + targets[start]))  # rows, if no later pair were longer
        window = slice(start, start + most)
        longest = np.maximum.accumulate(sources[window]) + np.maximum.accumulate(targets[window])
        cost = longest * np.arange(1, len(longest) + 1)
        rows = max(1, int(np.searchsorted(cost, budget, side="right")))
        batches.append(order[start : start + rows])
        start += rows
    return batches
