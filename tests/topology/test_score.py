"""Removal scores against hand-computed numbers and sums over links."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.topology.score import NEEDS_GRADIENT, SCORES, general, magnitude, relative_importance, two_sided


def test_magnitude():
    weight = torch.tensor([[-2.0, 0.0], [0.5, 1.0]])
    assert magnitude(weight, weight != 0, None, 1.0).tolist() == [[2.0, 0.0], [0.5, 1.0]]


def test_relative_importance_by_hand():
    weight = torch.tensor([[-2.0, 0.0], [1.0, 3.0]])
    score = relative_importance(weight, weight != 0, None, 1.0)
    eps = 1e-5
    expected = [2 / (2 + eps) + 2 / (3 + eps), 1 / (4 + eps) + 1 / (3 + eps), 3 / (4 + eps) + 3 / (3 + eps)]
    assert score[weight != 0].tolist() == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_relative_importance_sums_over_links(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator) * mask
    score = relative_importance(weight, mask, None, 1.0)
    for i, j in mask.nonzero().tolist():
        row = sum(abs(weight[i, b].item()) for b in range(columns) if mask[i, b])
        column = sum(abs(weight[a, j].item()) for a in range(rows) if mask[a, j])
        size = abs(weight[i, j].item())
        assert score[i, j].item() == pytest.approx(size / (row + 1e-5) + size / (column + 1e-5), rel=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_fp32_and_leave_their_inputs_alone(name):
    weight = torch.nn.Parameter(torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16))
    gradient = torch.tensor([[0.5, -0.25]]) if name in NEEDS_GRADIENT else None
    score = SCORES[name](weight, torch.ones(1, 2, dtype=torch.bool), gradient, 1.0)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    assert weight.tolist() == [[-1.0, 2.0]]


def test_the_general_score_runs_from_relative_importance_to_magnitude():
    weight = torch.tensor([[-2.0, 0.0], [1.0, 3.0]])
    links = weight != 0
    assert torch.equal(general(weight, links, None, 1.0)[links], weight.abs()[links])
    half = relative_importance(weight, links, None, 0.0)[links] / 2
    assert general(weight, links, None, 0.0)[links].tolist() == pytest.approx(half.tolist())
    # 002 eq. 2 at alpha 0.25 by hand, for the link of weight 1: row sum 4, column sum 3
    assert general(weight, links, None, 0.25)[1, 0].item() == pytest.approx(0.5 / 3.25 + 0.5 / 2.5, rel=1e-5)


def test_scores_with_a_gradient_by_hand():
    weight, gradient = torch.tensor([[-2.0, 0.5]]), torch.tensor([[3.0, -8.0]])
    expected = {
        "mest": [2 + 0.03, 0.5 + 0.08],
        "snip": [6, 4],
        "sensitivity": [1.5, 16],
        "reciprocal_sensitivity": [2 / 3, 1 / 16],
    }
    assert expected.keys() == NEEDS_GRADIENT
    for name, values in expected.items():
        score = SCORES[name](weight, weight != 0, gradient, 1.0)
        assert score[0].tolist() == pytest.approx(values, rel=1e-4)


def test_two_sided_removal_takes_its_share_of_each_sign():
    """Of 3 to remove among 2 positive and 4 negative links: the smallest positive one and the two nearest 0."""
    weight = torch.tensor([[0.1, 5.0, -0.2, -0.3, -7.0, -8.0]])
    score = two_sided(weight, weight != 0, None, 1.0)[0]
    assert set(score.argsort()[:3].tolist()) == {0, 2, 3}
    zero = two_sided(torch.tensor([[0.0, 1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool), None, 1.0)[0]
    assert zero[0] == 0 < zero[1:].min()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_two_sided_removal_against_its_definition(positive: int, negative: int, data):
    weight = torch.cat([torch.rand(positive) + 0.01, -torch.rand(negative) - 0.01])
    count = data.draw(st.integers(0, positive + negative))
    gone = two_sided(weight[None], torch.ones(1, len(weight), dtype=torch.bool), None, 1.0)[0].argsort()[:count]
    removed = [int((weight[gone] > 0).sum()), int((weight[gone] < 0).sum())]
    assert abs(removed[0] - count * positive / (positive + negative)) < 1
    for sign, number in ((1, removed[0]), (-1, removed[1])):
        same = (weight[weight * sign > 0]).abs().sort().values
        assert weight[gone][weight[gone] * sign > 0].abs().sort().values.tolist() == same[:number].tolist()
