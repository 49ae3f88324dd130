"""Batches of sentence pairs by a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


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
    """Training batches in order, without end."""

    def __len__(self) -> int:
        """Batches of epoch 0."""
        raise NotImplementedError

    def epoch(self, number: int) -> list[np.ndarray]:
        """Pair numbers of each batch of an epoch."""
        raise NotImplementedError

    def next(self, rank: int, world: int, passes: int) -> tuple[list[dict[str, Tensor]], PairTokens]:
        """The next global batch: the ``passes`` parts of this rank, and what the whole of it holds."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, and batch within it."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        raise NotImplementedError


class HeldOut:
    """Pairs of validation or test."""

    sources: list[str]
    references: list[str]

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, batch_tokens: int, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The first ``limit`` pairs (None: all), sorted by length, in batches within the budget."""
        raise NotImplementedError
