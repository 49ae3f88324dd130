"""Measures by hand, and against slow counts of paths."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.topology.measure import clustering, degree_exponent, elm_overlap, itop


def test_itop_per_layer_mean_and_overall():
    rates = itop({"small": 2, "large": 1}, {"small": 4, "large": 12})
    assert rates.layers == {"small": 0.5, "large": pytest.approx(1 / 12)}
    assert rates.mean == pytest.approx((1 / 2 + 1 / 12) / 2)
    assert rates.overall == 3 / 16


def test_overlap_is_the_share_of_links_that_came_back():
    rates = elm_overlap({"a": 1, "b": 3, "c": 0}, {"a": 4, "b": 3, "c": 0})
    assert rates.layers == {"a": 0.25, "b": 1.0, "c": 0.0}
    assert rates.mean == pytest.approx(1.25 / 3)
    assert rates.overall == 4 / 7
    assert elm_overlap({"a": 0}, {"a": 0}).overall == 0.0


def slow_clustering(mask_OI: torch.Tensor) -> float:
    """Walk every path u0 - i0 - u1 - i1 of three links and look for the fourth, i1 - u0."""
    outputs, inputs = mask_OI.shape
    paths = closed = 0
    for i0, u1 in itertools.product(range(inputs), range(outputs)):
        if not mask_OI[u1, i0]:
            continue
        for u0, i1 in itertools.product(range(outputs), range(inputs)):
            if u0 != u1 and i1 != i0 and mask_OI[u0, i0] and mask_OI[u1, i1]:
                paths += 1
                closed += bool(mask_OI[u0, i1])
    return closed / paths if paths else 0.0


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 8)), density=st.floats(0, 1), seed=st.integers(0, 1000))
def test_clustering_is_the_share_of_closed_paths(shape: tuple[int, int], density: float, seed: int):
    mask_OI = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    assert clustering(mask_OI) == pytest.approx(slow_clustering(mask_OI))
    assert clustering(mask_OI.T) == pytest.approx(slow_clustering(mask_OI))


def test_clustering_by_hand_and_over_blocks():
    assert clustering(torch.ones(5, 7, dtype=torch.bool)) == 1.0
    assert clustering(torch.eye(5, dtype=torch.bool)) == 0.0
    path = torch.tensor([[1, 1], [0, 1]], dtype=torch.bool)
    assert clustering(path) == 0.0
    # squares beside each other, across the seams of the blocks of neurons
    squares = torch.block_diag(*[torch.ones(2, 2)] * 1100).bool()
    assert clustering(squares[1:, 1:]) == pytest.approx(1.0)


def power_law(exponent: float, x_min: int, number: int) -> torch.Tensor:
    """Numbers with P(x) ~ x ** -exponent from x_min on, by the inverse of their distribution."""
    x = torch.arange(x_min, 200_000, dtype=torch.float64)
    above = torch.special.zeta(torch.tensor(exponent, dtype=torch.float64), x)  # sums from x on
    draws = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * above[0]
    return x_min + len(x) - 1 - torch.searchsorted(above.flip(0), draws)


@pytest.mark.parametrize(("exponent", "x_min"), [(2.0, 1), (2.76, 5), (3.5, 10)])
def test_the_exponent_of_a_power_law_is_found(exponent: float, x_min: int):
    degrees = power_law(exponent, x_min, 20_000)
    assert int(degrees.min()) == x_min
    known = degree_exponent(degrees, x_min)
    assert (known.exponent, known.x_min) == (pytest.approx(exponent, rel=0.02), x_min)
    # spoil what is below 3 * x_min: it finds where the law begins
    spoiled = torch.cat(
        [degrees[degrees >= 3 * x_min], torch.full((3000,), 2 * x_min), torch.full((500,), 3 * x_min - 1)]
    )
    fit = degree_exponent(spoiled)
    assert fit.x_min >= 3 * x_min
    assert fit.exponent == pytest.approx(exponent, rel=0.1)
    assert fit.distance < 0.05


def test_the_exponent_maximises_the_likelihood():
    degrees = torch.tensor([1, 1, 1, 1, 2, 2, 3, 7])
    best = degree_exponent(degrees, 1).exponent

    def likelihood(exponent: float) -> float:
        zeta = sum(k**-exponent for k in range(1, 200_000))
        return sum(-exponent * math.log(d) - math.log(zeta) for d in degrees.tolist())

    assert likelihood(best) > max(likelihood(best - 0.02), likelihood(best + 0.02))
