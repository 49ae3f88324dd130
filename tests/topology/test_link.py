"""Link predictors against brute force over paths and against the scores of the authors' own code."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology import node_rules, path_rules
from llm_cht.topology.link import LINK_SCORES, NEEDS_GRADIENT, NEEDS_MOMENTUM, PREDICTORS, cost, estimated_seconds
from tests.topology.numpy_loop import path_scores_by_loop

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ch_scores.npz")
GRAPHS = [name.removesuffix("_links") for name in GOLDEN if name.endswith("_links")]
CH_RULES = ("ch2_l3n", "ch3_l3n", "ch2_l3p", "ch3_l3p")

# Both ways to compute a rule: as on a sparse layer, and as on a denser one.
WAYS = {"sparse": 1.1, "dense": 0.0}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(node_rules, "SPARSE_BELOW", WAYS[request.param])
    monkeypatch.setattr(path_rules, "PATHS_BELOW", WAYS[request.param])
    return request.param


def random_mask(rows: int, columns: int, density: float, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def scores(rule: str, mask: Tensor, workspace_mb: int = 1) -> Tensor:
    return PREDICTORS[rule](mask, None, workspace_mb)


def brute_force(mask: Tensor, rule: str) -> Tensor:
    """Scores of every missing link by walking all its paths i - b - j - a over sets of neighbours, in float64."""
    outputs = [set(row.nonzero().flatten().tolist()) for row in mask]
    inputs = [set(column.nonzero().flatten().tolist()) for column in mask.T]
    score = torch.zeros(mask.shape, dtype=torch.float64)
    for i, a in (~mask).nonzero().tolist():
        for b in outputs[i]:
            for j in inputs[a] & inputs[b]:
                inside_j, inside_b = len(outputs[i] & outputs[j]), len(inputs[a] & inputs[b])
                outside_j, outside_b = len(outputs[j] - outputs[i]), len(inputs[b] - inputs[a])  # with the far end
                ch2 = rule.startswith("ch2")
                top_j, top_b = (inside_j + 1, inside_b + 1) if ch2 else (1, 1)
                if rule == "cn_l3":
                    score[i, a] += 1
                elif rule.endswith("p"):
                    score[i, a] += math.sqrt(top_j * top_b / (outside_j * outside_b))
                else:  # every node once, not once a path
                    score[i, a] += top_j / outside_j / inside_j + top_b / outside_b / inside_b
    return score


def brute_force_on_links(mask: Tensor, rule: str) -> Tensor:
    """Scores of every existing link, in the graph without it."""
    score = torch.zeros(mask.shape, dtype=torch.float64)
    for i, a in mask.nonzero().tolist():
        without = mask.clone()
        without[i, a] = False
        score[i, a] = brute_force(without, rule)[i, a]
    return score


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", CH_RULES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_ch_rules_equal_the_authors_scores(graph, rule):
    expected = torch.from_numpy(GOLDEN[f"{graph}_{rule}"])
    mask = torch.from_numpy(GOLDEN[f"{graph}_links"])
    torch.testing.assert_close(scores(rule, mask).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", CH_RULES)
def test_brute_force_equals_the_authors_scores(rule):
    mask = torch.from_numpy(GOLDEN[f"{GRAPHS[0]}_links"])
    torch.testing.assert_close(
        brute_force(mask, rule), torch.from_numpy(GOLDEN[f"{GRAPHS[0]}_{rule}"]), rtol=1e-12, atol=0
    )


def check(rule: str, mask: Tensor) -> None:
    score = scores(rule, mask)
    assert score.dtype == torch.float32
    assert score.is_contiguous()
    assert (score[mask] == 0).all()
    torch.testing.assert_close(score.double(), brute_force(mask, rule), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores(rule, mask.T), score.T, rtol=1e-5, atol=0)  # the two sides are alike


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("rule", [*CH_RULES, "cn_l3"])
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_rules_equal_brute_force(rule, name, rows, columns, density, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_rules, "SPARSE_BELOW", WAYS[name])
        patch.setattr(path_rules, "PATHS_BELOW", WAYS[name])
        check(rule, random_mask(rows, columns, density, seed))


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
    masks["one node a side"] = torch.zeros(1, 1, dtype=torch.bool)
    masks["one link"] = torch.ones(1, 1, dtype=torch.bool)
    masks["star"] = torch.zeros(5, 6, dtype=torch.bool)
    masks["star"][2] = True
    masks["two stars"] = masks["star"].clone()
    masks["two stars"][:, 1] = True
    masks["two blocks"] = torch.zeros(6, 7, dtype=torch.bool)
    masks["two blocks"][:3, :4] = masks["two blocks"][3:, 4:] = True
    return masks


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", [*CH_RULES, "cn_l3"])
@pytest.mark.parametrize("name", degenerate())
def test_rules_of_degenerate_graphs(name, rule):
    check(rule, degenerate()[name])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", CH_RULES)
@pytest.mark.parametrize("name", degenerate())
def test_an_existing_link_is_scored_as_if_it_were_missing(name, rule):
    for mask in (degenerate()[name], random_mask(8, 11, 0.35, 3)):
        score = LINK_SCORES[rule](mask, 1)
        torch.testing.assert_close(score.double(), brute_force_on_links(mask, rule), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("rule", "expected"), [("ch2_l3n", 4), ("ch3_l3n", 2), ("ch2_l3p", 2), ("ch3_l3p", 1), ("cn_l3", 1)]
)
def test_rules_by_hand(rule, expected):
    """A path of four neurons, output 0 - input 0 - output 1 - input 1: one missing link, one path of length three.

    Its inner nodes, output 1 and input 0, share one neighbour with the far end and have no other but the near one:
    UU[0, 1] = VV[1, 0] = 1, both degrees are 2. Node terms are (1 + 1) / (2 - 1) for CH2, 1 / (2 - 1) for CH3.
    """
    score = scores(rule, torch.tensor([[True, False], [True, True]]))
    assert score.flatten().tolist() == pytest.approx([0, expected, 0, 0], rel=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", [*CH_RULES, "cn_l3"])
def test_blocks_do_not_matter(rule, monkeypatch):
    mask = random_mask(300, 700, 0.02, 0)
    whole = scores(rule, mask, 256)
    monkeypatch.setattr(node_rules, "_PIECE", 1 << 12)
    monkeypatch.setattr(path_rules, "_CACHE", 1 << 14)
    torch.testing.assert_close(scores(rule, mask, 1), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores(rule, mask.T, 1), whole.T, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["ch2", "ch3"])
def test_the_loop_over_links_agrees(rule):
    mask = random_mask(90, 120, 0.05, 0)
    expected = torch.from_numpy(path_scores_by_loop(mask.numpy(), rule))
    torch.testing.assert_close(path_rules.path_scores(mask, 1, rule), expected, rtol=1e-5, atol=0)


def test_a_workspace_too_small_for_one_row_is_refused():
    with pytest.raises(UserError, match=r"`method.workspace_mb` = 1: too small for a layer with 200000 neurons"):
        scores("ch2_l3n", torch.ones(1, 200_000, dtype=torch.bool))
    with pytest.raises(UserError, match=r"`method.workspace_mb` = 1: too small for a layer with 200001 neurons"):
        scores("ch2_l3n", torch.zeros(1, 200_000, dtype=torch.bool))
    with pytest.raises(UserError, match=r"`method.workspace_mb` = 1: too small for a layer with 200001 neurons"):
        scores("ch3_l3p", torch.ones(1, 200_000, dtype=torch.bool))


def test_random_is_one_on_missing_links():
    mask = random_mask(5, 6, 0.5, 0)
    assert torch.equal(scores("random", mask), 1 - mask.float())


def test_preferential_is_the_product_of_degrees():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert scores("preferential", mask).tolist() == [[0, 1, 0], [0, 0, 0]]
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert scores("preferential", mask).tolist() == [[0, 0, 2], [0, 2, 0]]


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_leave_their_inputs_alone(name):
    mask, gradient = random_mask(20, 30, 0.2, 0), torch.randn(20, 30)
    before, gradient_before = mask.clone(), gradient.clone()
    score = PREDICTORS[name](mask, gradient, 1)
    assert score.shape == mask.shape
    assert score.dtype == torch.float32
    assert (score[mask] == 0).all()
    assert (score >= 0).all()
    assert torch.equal(mask, before)
    assert torch.equal(gradient, gradient_before)
    assert (name in NEEDS_GRADIENT | NEEDS_MOMENTUM) == torch.equal(score, gradient.abs() * ~mask)


@pytest.mark.parametrize("measure", [cost, estimated_seconds])
@pytest.mark.parametrize("name", PREDICTORS)
def test_cost_grows_with_shape_and_density(measure: Callable[[str, tuple[int, int], float], float], name):
    assert 0 < measure(name, (64, 32), 0.1) < measure(name, (64, 64), 0.1)
    densities = [measure(name, (512, 1376), density) for density in (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)]
    assert densities == sorted(densities)
    # a path rule at 10 % of LLaMA-7B's MLP is out of reach, at 1 % of the papers' MLP it is not
    assert (
        estimated_seconds("ch3_l3p", (11008, 4096), 0.1) > 3600 > 60 > estimated_seconds("ch3_l3p", (784, 1568), 0.01)
    )
