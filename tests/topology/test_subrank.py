"""Sub-ranking against Dijkstra and Spearman's correlation written out, and through a whole choice."""

import heapq
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_cht.topology import subrank as subrank_module
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import LINK_SCORES, PREDICTORS
from llm_cht.topology.select import choose_missing
from llm_cht.topology.subrank import subrank


def shortest_paths(mask: Tensor, link_score: Tensor, source: int) -> list[float]:
    """Lengths from neuron ``source`` to all (outputs first), by a heap."""
    out, inputs = mask.shape
    distance = [math.inf] * (out + inputs)
    queue = [(0.0, source)]
    while queue:
        length, node = heapq.heappop(queue)
        if length >= distance[node]:
            continue
        distance[node] = length
        for other in range(out, out + inputs) if node < out else range(out):
            o, i = min(node, other), max(node, other) - out
            if mask[o, i]:
                heapq.heappush(queue, (length + 1 / (1 + link_score[o, i].item()), other))
    return distance


def average_ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def spearman(a: list[float], b: list[float]) -> float:
    x, y = (torch.tensor(average_ranks(values), dtype=torch.float64) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def reference(mask: Tensor, link_score: Tensor, positions: Tensor) -> Tensor:
    out, inputs = mask.shape
    lengths = [shortest_paths(mask, link_score, node) for node in range(out + inputs)]
    pairs = [(p // inputs, out + p % inputs) for p in positions.tolist()]
    return torch.tensor([spearman(lengths[a], lengths[b]) for a, b in pairs], dtype=torch.float64)


def missing(mask: Tensor) -> Tensor:
    return (~mask).flatten().nonzero().squeeze(1)


def test_by_hand():
    """A path output 0 - input 0 - output 1 - input 1 with lengths 1, 1/2, 1; its ends are the one missing link.

    Neurons in the order output 0, output 1, input 0, input 1: lengths 0, 1.5, 1, 2.5 from output 0 and 2.5, 1, 1.5, 0
    from input 1, ranks 0, 2, 1, 3 and 3, 1, 2, 0: exactly opposite.
    """
    mask = torch.tensor([[True, False], [True, True]])
    link_score = torch.tensor([[0.0, 9.0], [1.0, 0.0]])
    assert subrank(mask, link_score, torch.tensor([1])).tolist() == [-1]


def test_unreachable_neurons_are_equally_far():
    """Two links without a common neuron: lengths 0, inf, 1, inf and inf, 0, inf, 1, ranks 0, 2.5, 1, 2.5 and so on."""
    mask = torch.eye(2, dtype=torch.bool)
    x, y = (torch.tensor(ranks, dtype=torch.float64) - 1.5 for ranks in ([0, 2.5, 1, 2.5], [2.5, 1, 2.5, 0]))
    assert subrank(mask, torch.zeros(2, 2), torch.tensor([1])).tolist() == pytest.approx([float(x @ y / (x @ x))])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0, 1), st.booleans(), st.sampled_from([40, 1 << 20]), st.data())
def test_equals_dijkstra(rows, columns, density, with_ties, numbers, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = torch.rand(rows, columns, generator=generator) < density
    link_score = 4 * torch.rand(rows, columns, generator=generator)
    link_score = link_score.floor() if with_ties else link_score
    positions = missing(mask)[torch.randperm(int((~mask).sum()), generator=generator)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subrank_module, "_NUMBERS", numbers)  # 40: several blocks of sources on both sides
        second = subrank(mask, link_score, positions)
    torch.testing.assert_close(second, reference(mask, link_score, positions), rtol=1e-12, atol=1e-12)


def test_orders_what_ch3_l3p_leaves_tied():
    mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(2)) < 0.2
    score = PREDICTORS["ch3_l3p"](mask, None, 1)
    link_score = LINK_SCORES["ch3_l3p"](mask, 1)
    values, counts = score[score > 0].unique(return_counts=True)
    level = values[counts.argmax()]
    tied = (score.flatten() == level).nonzero().squeeze(1)
    assert len(tied) > 2, "the example has no ties"
    num_above = int((score > level).sum())
    second = reference(mask, link_score, tied)
    chosen = choose_missing(
        score, mask, num_above + 1, None, Keys(0, 1, "up"), lambda positions: subrank(mask, link_score, positions)
    )
    winner = set(chosen.tolist()) - set((score.flatten() > level).nonzero().flatten().tolist())
    best = tied[second >= second.max() - 1e-12].tolist()
    assert len(winner) == 1
    assert winner <= set(best)
