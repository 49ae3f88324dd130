"""What the masks of a run say about it: how much was explored, how links are spread, how much regrowth undoes.

Counts of links go in, fractions come out, always the same three: per layer, their plain mean (every layer counts alike)
and the overall one (every link counts alike); papers print one or the other without saying which. Counts rather than
masks, so that ranks can exchange them. Active neurons (ANP) need the percolation rules and are counted there.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """One fraction per layer, their mean over the layers, and the fraction over all layers together."""

    layers: dict[str, float]
    mean: float
    overall: float


def itop(held: Mapping[str, int], positions: Mapping[str, int]) -> Rates:
    """Return the share of the ``positions`` of each layer that have ever ``held`` a link."""
    return _rates(held, positions)


def elm_overlap(returned: Mapping[str, int], regrown: Mapping[str, int]) -> Rates:
    """Return the share of the links ``regrown`` in each layer that the same update had taken away.

    Taken away by removal or percolation; links pruned by density decay do not count. Near 1 a layer has settled
    (epitopological local minimum). 0.0 where nothing was regrown.
    """
    return _rates(returned, regrown)


def _rates(part: Mapping[str, int], whole: Mapping[str, int]) -> Rates:
    layers = {name: part[name] / max(1, whole[name]) for name in whole}
    return Rates(layers, sum(layers.values()) / len(layers), sum(part.values()) / max(1, sum(whole.values())))
