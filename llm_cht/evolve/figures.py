"""The figures of a topology update for the metrics: counts of links, the same on every rank, and seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm_cht import dist
from llm_cht.topology.measure import elm_overlap, itop

COUNTS = ("pruned", "removed", "percolated", "regrown", "returned", "grown", "links", "explored", "bytes")
"""Columns of the counts of a layer; ``regrown`` includes those that ``returned``, ``grown`` does not."""


def figures(positions: Mapping[str, int], counts: Tensor, neurons: tuple[int, int]) -> dict[str, Any]:
    """What the metrics record of an update.

    Args:
        positions: of each layer, existing or missing.
        counts: int64 (layers, ``COUNTS``).
        neurons: active ones and all; 0 where no layers belong together.
    """
    columns = zip(COUNTS, counts.T.tolist(), strict=True)
    by_kind = {kind: dict(zip(positions, column, strict=True)) for kind, column in columns}
    explored = itop(by_kind["explored"], positions)
    overlap = elm_overlap(by_kind["returned"], by_kind["regrown"])
    active, total = neurons
    return {
        "density": sum(by_kind["links"].values()) / sum(positions.values()),
        **{kind: sum(by_kind[kind].values()) for kind in ("pruned", "removed", "percolated", "regrown")},
        "overlap": overlap.overall,
        "anp": active / total if total else None,
        "itop": explored.overall,
        "itop_mean": explored.mean,
        "layers": {
            name: {
                "sparsity": 1 - by_kind["links"][name] / positions[name],
                "itop": explored.layers[name],
                "overlap": overlap.layers[name],
            }
            for name in positions
        },
    }


class Clock:
    """Seconds of the phases of an update."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[phase] = now - self._last
        self._last = now

    def figures(self, gathered: int, exchanged: int, predicted: float) -> dict[str, Any]:
        """Seconds of the whole and of each phase (of every rank, where there are many), bytes, balance."""
        figures: dict[str, Any] = {"seconds_update": sum(self._seconds.values())}
        if dist.world_size() == 1:
            return figures | {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        everybody = dist.gather([[round(s, 6) for s in self._seconds.values()], gathered])
        for i, phase in enumerate(self._seconds):
            figures[f"seconds_{phase}"] = [seconds[i] for seconds, _ in everybody]
        compute = figures["seconds_compute"]
        sent = {"bytes_gathered": sum(count for _, count in everybody), "bytes_exchanged": exchanged}
        return figures | sent | {"balance": sum(compute) / len(compute) / max(compute), "balance_predicted": predicted}
