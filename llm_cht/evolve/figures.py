"""The figures of a topology update for the metrics, from counts of links; the same on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from llm_cht.topology.measure import elm_overlap, itop
from llm_cht.topology.method import Moment

if TYPE_CHECKING:
    from llm_cht.evolve.updater import TopologyUpdater

COUNTS = ("pruned", "removed", "percolated", "regrown", "returned", "grown", "links", "explored")
"""Columns of the counts of a layer; ``regrown`` includes those that ``returned``, ``grown`` does not."""


def figures(updater: TopologyUpdater, moment: Moment, counts: Tensor) -> dict[str, Any]:
    """What the metrics record of an update; ``counts`` is int64 (layers, ``COUNTS``). A collective."""
    active, neurons = updater.active()  # 0 neurons where no layers belong together
    names = list(updater.sparse.layers)
    by_kind = {
        kind: dict(zip(names, column, strict=True)) for kind, column in zip(COUNTS, counts.T.tolist(), strict=True)
    }
    positions = {name: layer.mask.numel() for name, layer in updater.sparse.layers.items()}
    explored = itop(by_kind["explored"], positions)
    overlap = elm_overlap(by_kind["returned"], by_kind["regrown"])
    layers = {
        name: {
            "sparsity": 1 - by_kind["links"][name] / positions[name],
            "itop": explored.layers[name],
            "overlap": overlap.layers[name],
        }
        for name in names
    }
    totals = {kind: sum(by_kind[kind].values()) for kind in ("pruned", "removed", "percolated", "regrown")}
    return {
        "update": moment.update,
        "zeta": updater.method.zeta(moment.step),
        "temperature": updater.method.temperature(moment.step),
        "density": sum(by_kind["links"].values()) / sum(positions.values()),
        **totals,
        "overlap": overlap.overall,
        "anp": active / neurons if neurons else None,
        "itop": explored.overall,
        "itop_mean": explored.mean,
        "layers": layers,
    }
