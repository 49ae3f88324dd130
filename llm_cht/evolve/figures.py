"""The figures of a topology update for the metrics, from counts of links; the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
