"""The order of training: which sequence is sample number 0, 1, 2, ... of the whole run.

Epoch after epoch, each a permutation drawn from (seed, epoch), without a gap: sample g belongs to epoch g // N and
stands at place g % N of it. So the position of a run is one number, a global batch is the same for any number of
ranks, and nothing is dropped. A shuffle buffer was rejected: a resume could not restore it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from llm_cht.data.pack import Sequences


def permutation(seed: int, epoch: int, count: int, *stream: int) -> np.ndarray:
    """A permutation of 0 .. count - 1, a function of (seed, epoch) and of ``stream``, for a second one of an epoch."""
    # RandomState: the only generator of numpy and torch whose stream is promised never to change
    return np.random.RandomState([seed % 2**32, seed >> 32, epoch, *stream]).permutation(count)


class Batches:
    """Training batches from stored sequences."""

    def __init__(self, sequences: Sequences, seed: int) -> None:
        self._sequences, self._seed = sequences, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        self._next = 0

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return len(self._sequences)

    def batch(self, start: int, count: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Of samples start .. start + count - 1 of the run the ``rows``: ``input_ids`` and ``labels``, int64.

        All ranks ask for the same samples, each for rows of its own; only those are read.
        """
        self._next = start + count
        return self._sequences.take(np.array([self._sequence(sample) for sample in range(start, start + count)[rows]]))

    def state_dict(self) -> dict[str, Any]:
        """The number of the next sample."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self._next = state["next"]

    def _sequence(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._seed, epoch, len(self))
        return int(self._order[place])
