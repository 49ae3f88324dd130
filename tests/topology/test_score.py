"""Removal scores against hand-computed numbers and sums over links."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.topology.score import SCORES, magnitude, relative_importance


def test_magnitude():
    weight = torch.tensor([[-2.0, 0.0], [0.5, 1.0]])
    assert magnitude(weight, weight != 0, None).tolist() == [[2.0, 0.0], [0.5, 1.0]]


def test_relative_importance_by_hand():
    weight = torch.tensor([[-2.0, 0.0], [1.0, 3.0]])
    score = relative_importance(weight, weight != 0, None)
    eps = 1e-5
    expected = [2 / (2 + eps) + 2 / (3 + eps), 1 / (4 + eps) + 1 / (3 + eps), 3 / (4 + eps) + 3 / (3 + eps)]
    assert score[weight != 0].tolist() == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_relative_importance_sums_over_links(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator) * mask
    score = relative_importance(weight, mask, None)
    for i, j in mask.nonzero().tolist():
        row = sum(abs(weight[i, b].item()) for b in range(columns) if mask[i, b])
        column = sum(abs(weight[a, j].item()) for a in range(rows) if mask[a, j])
        size = abs(weight[i, j].item())
        assert score[i, j].item() == pytest.approx(size / (row + 1e-5) + size / (column + 1e-5), rel=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_fp32_and_leave_their_inputs_alone(name):
    weight = torch.nn.Parameter(torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16))
    score = SCORES[name](weight, torch.ones(1, 2, dtype=torch.bool), None)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    assert weight.tolist() == [[-1.0, 2.0]]
