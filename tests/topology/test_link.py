"""Link predictors against brute force over paths and against the scores of the authors' own code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology.link import PREDICTORS, ch2_l3n, random

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ch_scores.npz")
GRAPHS = [name.removesuffix("_links") for name in GOLDEN if name.endswith("_links")]


def random_mask(rows: int, columns: int, density: float, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def brute_force(mask: Tensor) -> Tensor:
    """CH2-L3n of every missing link by sets of neighbours, in float64."""
    outputs = [set(row.nonzero().flatten().tolist()) for row in mask]
    inputs = [set(column.nonzero().flatten().tolist()) for column in mask.T]
    score = torch.zeros(mask.shape, dtype=torch.float64)
    for i, a in (~mask).nonzero().tolist():
        for j in inputs[a]:  # paths i - . - j - a
            common = len(outputs[i] & outputs[j])
            if common:
                score[i, a] += (common + 1) / len(outputs[j] - outputs[i])  # holds a, so never empty
        for b in outputs[i]:  # paths i - b - . - a
            common = len(inputs[a] & inputs[b])
            if common:
                score[i, a] += (common + 1) / len(inputs[b] - inputs[a])
    return score


@pytest.mark.parametrize("graph", GRAPHS)
def test_ch2_l3n_equals_the_authors_scores(graph):
    mask = torch.from_numpy(GOLDEN[f"{graph}_links"])
    expected = torch.from_numpy(GOLDEN[f"{graph}_ch2_l3n"])
    torch.testing.assert_close(ch2_l3n(mask, None, 1).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(brute_force(mask), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 14), st.integers(1, 14), st.floats(0, 1), st.integers(0, 2**31))
def test_ch2_l3n_equals_brute_force(rows, columns, density, seed):
    mask = random_mask(rows, columns, density, seed)
    score = ch2_l3n(mask, None, 1)
    assert score.dtype == torch.float32
    assert (score[mask] == 0).all()
    torch.testing.assert_close(score.double(), brute_force(mask), rtol=1e-5, atol=0)
    torch.testing.assert_close(ch2_l3n(mask.T, None, 1), score.T, rtol=1e-6, atol=0)  # the two sides are alike


def degenerate() -> dict[str, Tensor]:
    masks = {name: random_mask(9, 7, 0.4, 0) for name in ("empty rows", "empty columns", "full row", "equal rows")}
    masks["empty rows"][2:5] = False
    masks["empty columns"][:, 3:] = False
    masks["full row"][0] = True  # every other row is a subset of it: denominator 0
    masks["equal rows"][1:4] = masks["equal rows"][0]
    masks["full"] = torch.ones(4, 6, dtype=torch.bool)
    masks["empty"] = torch.zeros(4, 6, dtype=torch.bool)
    masks["identity"] = torch.eye(5, dtype=torch.bool)
    masks["one row"] = torch.tensor([[True, False, True]])
    return masks


@pytest.mark.parametrize("name", degenerate())
def test_ch2_l3n_of_degenerate_graphs(name):
    mask = degenerate()[name]
    score = ch2_l3n(mask, None, 1)
    assert score.isfinite().all()
    torch.testing.assert_close(score.double(), brute_force(mask), rtol=1e-5, atol=0)


def test_ch2_l3n_by_hand():
    """A path of four neurons, output 0 - input 0 - output 1 - input 1: one missing link, one path of length three.

    e_U[0, 1] = (1 + 1) / (2 - 1) and e_V[1, 0] = (1 + 1) / (2 - 1).
    """
    assert ch2_l3n(torch.tensor([[True, False], [True, True]]), None, 1).tolist() == [[0, 4], [0, 0]]


def test_blocks_do_not_matter():
    mask = random_mask(700, 300, 0.1, 0)  # 1 MiB: blocks of 164 rows
    torch.testing.assert_close(ch2_l3n(mask, None, 1), ch2_l3n(mask, None, 64), rtol=1e-6, atol=0)


def test_a_workspace_too_small_for_one_row_is_refused():
    with pytest.raises(UserError, match=r"`method.workspace_mb` = 1: too small for a layer with 200000 neurons"):
        ch2_l3n(torch.ones(1, 200_000, dtype=torch.bool), None, 1)


def test_random_is_one_on_missing_links():
    mask = random_mask(5, 6, 0.5, 0)
    assert torch.equal(random(mask, None, 1), 1 - mask.float())


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_leave_the_mask_alone(name):
    mask = random_mask(20, 30, 0.2, 0)
    before = mask.clone()
    score = PREDICTORS[name](mask, torch.randn(mask.shape), 1)
    assert score.shape == mask.shape
    assert (score[mask] == 0).all()
    assert (score >= 0).all()
    assert torch.equal(mask, before)
