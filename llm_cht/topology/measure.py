"""What the masks of a run say about it: how much was explored, how links are spread, how much regrowth undoes.

Rates: counts of links go in, fractions come out, always the same three: per layer, their plain mean (every layer counts
alike) and the overall one (every link counts alike); papers print one or the other without saying which. Counts rather
than masks, so that ranks can exchange them. Active neurons (ANP) need the percolation rules and are counted there.

Shapes of networks: clustering and the exponent of a power law of degrees, by maximum likelihood. Rejected: a straight
line through the logarithms of a histogram, whose slope depends on the bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024
"""neurons whose common neighbours are counted at a time"""

_EXPONENTS = (1.01, 20.0)
_TAIL = 50
"""degrees that a tail must hold for its exponent to mean something"""


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


def clustering(mask_OI: Tensor) -> float:
    """Share of the paths of three links that a fourth link closes: 4 * squares / paths; 0.0 without such a path.

    The bipartite kin of the clustering coefficient, for which triangles do not exist. Near the density in a random
    mask. Costs min(out, in) ** 2 * max(out, in) multiplications, in blocks.
    """
    narrow = mask_OI if mask_OI.shape[0] <= mask_OI.shape[1] else mask_OI.T
    # Paths by their middle link. Whole numbers below 2**53 are exact in fp64.
    ends = (narrow.sum(dim=1).double() - 1, narrow.sum(dim=0).double() - 1)
    paths = squares = 0.0
    blocks = narrow.split(_BLOCK)
    for i, block in enumerate(blocks):
        rows = block.float()
        paths += float((rows.double() @ ends[1]) @ ends[0][i * _BLOCK : i * _BLOCK + len(block)])
        for j in range(i, len(blocks)):
            shared = rows @ blocks[j].float().T  # common neighbours, exact in fp32 below 2**24
            pairs = shared.double().mul_(shared - 1)
            squares += float(pairs.triu_(diagonal=1).sum() if i == j else pairs.sum()) / 2
    return 4 * squares / paths if paths else 0.0


@dataclass(frozen=True)
class PowerLaw:
    """Degrees from ``x_min`` on fall as degree ** -``exponent``."""

    exponent: float
    x_min: int
    distance: float
    """largest difference between the cumulative shares of the degrees and of the law (Kolmogorov and Smirnov)"""


def degree_exponent(degrees: Tensor, x_min: int | None = None) -> PowerLaw:
    """Fit a discrete power law to the tail of ``degrees`` (any shape, whole numbers) by maximum likelihood.

    Without ``x_min`` the one with the smallest distance is taken, among those that leave at least 50 degrees (Clauset,
    Shalizi and Newman 2009, sections 3.1 and 3.3).
    """
    degree = degrees.flatten().double().cpu()
    values, counts = degree[degree >= (x_min or 1)].unique(return_counts=True)
    assert len(values), "no degrees to fit"
    from_here = counts.flip(0).cumsum(0).flip(0)  # degrees in the tail that starts at each value
    if x_min is None:
        starts = values[: max(1, int((from_here >= _TAIL).count_nonzero()))]
    else:
        starts = torch.tensor([float(x_min)], dtype=torch.float64)
    tail = from_here[: len(starts)].double()
    mean_log = (counts * values.log()).flip(0).cumsum(0).flip(0)[: len(starts)] / tail
    exponents = _most_likely(starts, mean_log)
    best = PowerLaw(math.nan, 0, math.inf)
    for i, (start, exponent) in enumerate(zip(starts, exponents, strict=True)):
        share = counts[i:].cumsum(0) / tail[i]
        law = 1 - torch.special.zeta(exponent, values[i:] + 1) / torch.special.zeta(exponent, start)
        distance = float((share - law).abs().max())
        if distance < best.distance:
            best = PowerLaw(float(exponent), int(start), distance)
    return best


def _most_likely(start: Tensor, mean_log: Tensor) -> Tensor:
    """Exponents that maximise the likelihood of tails from ``start`` with a mean logarithm; golden section search."""
    low, high = (torch.full_like(start, bound) for bound in _EXPONENTS)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        # minus the logarithm of the likelihood, per degree
        loss = [torch.special.zeta(at, start).log() + at * mean_log for at in (left, right)]
        smaller = loss[0] < loss[1]
        low, high = torch.where(smaller, low, left), torch.where(smaller, right, high)
    return (low + high) / 2
