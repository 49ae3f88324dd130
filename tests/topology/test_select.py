"""Selection: exact counts, the right links, random ties, and samples with the right probabilities."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_cht.topology.keys import Keys
from llm_cht.topology.link import ch2_l3n
from llm_cht.topology.select import choose, choose_missing, top_k

KEYS = Keys(seed=0, update=1, layer="up_proj")


def test_top_k_by_hand():
    score = torch.tensor([3.0, -torch.inf, 5.0, 4.0, torch.inf])
    assert top_k(score, 3, KEYS, "tie").tolist() == [2, 3, 4]
    assert top_k(score, 5, KEYS, "tie").tolist() == [0, 1, 2, 3, 4]
    assert top_k(score, 0, KEYS, "tie").tolist() == []
    assert top_k(score[:0], 0, KEYS, "tie").tolist() == []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=40), st.data())
def test_top_k_is_exact_and_breaks_ties_by_the_bits(levels, data):
    k = data.draw(st.integers(0, len(levels)))
    score = torch.tensor(levels, dtype=torch.float32).sub(5).div(0.0 if data.draw(st.booleans()) else 1.0).nan_to_num(5)
    index = torch.arange(len(levels)) * 7 + 3
    bits = KEYS.bits("tie", index).tolist()
    best = sorted(range(len(levels)), key=lambda i: (-score[i].item(), -bits[i]))[:k]
    assert top_k(score, k, KEYS, "tie", index).tolist() == sorted(best)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40), st.data())
def test_ties_are_broken_by_a_second_score_then_by_the_bits(levels, data):
    k = data.draw(st.integers(0, len(levels)))
    score = torch.tensor([first for first, _ in levels], dtype=torch.float32)
    second = torch.tensor([second for _, second in levels], dtype=torch.float64)
    index = torch.arange(len(levels)) * 7 + 3
    asked = []

    def tie_break(positions: Tensor) -> Tensor:
        asked.append(positions)
        return second[(positions - 3) // 7]

    bits = KEYS.bits("tie", index).tolist()
    best = sorted(range(len(levels)), key=lambda i: (-score[i].item(), -second[i].item(), -bits[i]))[:k]
    assert top_k(score, k, KEYS, "tie", index, tie_break).tolist() == sorted(best)
    for positions in asked:
        assert len(score[(positions - 3) // 7].unique()) == 1


@pytest.mark.parametrize("k", [1, 50, 7000, 90_000, 250_000])
def test_top_k_of_many_scores(k):
    """Long enough for the bound from a sample, with many ties, and with a peak that the sample overrates or misses."""
    uniform = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    peaked, sampled = uniform.clone(), uniform.clone()
    peaked[1000:1020] += 5
    sampled[:: 300_000 // (1 << 14) | 1] += 5
    for score in (uniform, (100 * uniform).floor(), peaked, sampled):
        chosen = top_k(score, k, KEYS, "tie")
        assert torch.equal(score[chosen].sort().values, score.sort().values[-k:])
        assert len(chosen.unique()) == k


def test_ties_differ_between_keys_and_are_fair():
    taken = torch.zeros(10)
    for seed in range(2000):
        taken[top_k(torch.ones(10), 3, Keys(seed, 1, "up_proj"), "tie")] += 1
    assert ((taken / 2000 - 0.3).abs() < 5 * math.sqrt(0.3 * 0.7 / 2000)).all()


def test_nan_and_wrong_counts_are_defects():
    with pytest.raises(AssertionError, match="NaN"):
        top_k(torch.tensor([1.0, torch.nan]), 1, KEYS, "tie")
    with pytest.raises(AssertionError):
        top_k(torch.ones(3), 4, KEYS, "tie")


def subset_probabilities(weight: list[float], k: int) -> dict[tuple[int, ...], float]:
    """Probability of every set of ``k``, drawn one by one in proportion to the weights of those that are left."""
    result = dict.fromkeys(itertools.combinations(range(len(weight)), k), 0.0)
    for order in itertools.permutations(range(len(weight)), k):
        probability, left = 1.0, sum(weight)
        for item in order:
            probability *= weight[item] / left
            left -= weight[item]
        result[tuple(sorted(order))] += probability
    return result


def excess(counts: dict[tuple[int, ...], int], probability: dict[tuple[int, ...], float]) -> float:
    """Chi-square in standard deviations above its mean; sets expected fewer than five times count as one."""
    total = sum(counts.values())
    cells: list[tuple[float, float]] = []
    rare = [0.0, 0.0]
    for subset, chance in probability.items():
        cell = (counts.get(subset, 0), total * chance)
        if cell[1] < 5:
            rare = [rare[0] + cell[0], rare[1] + cell[1]]
        else:
            cells.append(cell)
    cells += [(rare[0], rare[1])] if rare[1] > 0 else []
    freedom = len(cells) - 1
    return (sum((seen - due) ** 2 / due for seen, due in cells) - freedom) / math.sqrt(2 * freedom)


SCORE = [0.3, 1.0, 2.5, 0.8, 1.7, 0.05]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("regrow", [False, True], ids=["choose", "choose_missing"])
def test_soft_choice_has_the_exact_probabilities(exponent, regrow):
    score, mask = torch.tensor(SCORE), torch.zeros(2, 3, dtype=torch.bool)
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4000):
        keys = Keys(seed, 1, "up_proj")
        chosen = (
            choose_missing(score.view(2, 3), mask, 3, exponent, keys)
            if regrow
            else choose(score, 3, exponent, keys, "remove")
        )
        subset = tuple(chosen.tolist())
        counts[subset] = counts.get(subset, 0) + 1
    probability = subset_probabilities([value**exponent for value in SCORE], 3)
    assert sum(probability.values()) == pytest.approx(1)
    assert excess(counts, probability) < 4
    wrong = subset_probabilities([value ** (exponent + 0.3) for value in SCORE], 3)
    assert excess(counts, wrong) > 4, "the test cannot tell exponents apart"


def test_hard_choice_is_the_best_and_soft_is_not():
    score = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    best = score.topk(100).indices.sort().values
    assert torch.equal(choose(score, 100, None, KEYS, "remove"), best)
    soft = {tuple(choose(score, 100, 1.0, Keys(seed, 1, "up"), "remove").tolist()) for seed in range(5)}
    assert len(soft) == 5
    assert tuple(best.tolist()) not in soft
    assert torch.equal(choose(score, 100, 1e6, KEYS, "remove"), best)  # a cold sample is the hard choice


def test_a_score_of_zero_is_drawn_last_and_at_random():
    score = torch.tensor([0.0, 1e-30, 0.0, 2.0, 0.0, 0.0])
    taken = torch.zeros(6)
    for seed in range(2000):
        chosen = choose(score, 3, 1.0, Keys(seed, 1, "up"), "remove")
        assert {1, 3} <= set(chosen.tolist())
        taken[chosen] += 1
    assert ((taken[[0, 2, 4, 5]] / 2000 - 0.25).abs() < 5 * math.sqrt(0.25 * 0.75 / 2000)).all()


def test_a_choice_depends_on_the_flat_index_alone():
    score = torch.rand(500, generator=torch.Generator().manual_seed(0))
    index = torch.arange(500) * 3
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    for exponent in (None, 2.0):
        here = choose(score, 50, exponent, KEYS, "remove", index)
        there = choose(score[order], 50, exponent, KEYS, "remove", index[order])
        assert torch.equal(index[here], index[order][there].sort().values)


def masked(rows: int, columns: int, density: float, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.sampled_from([None, 1.0]), st.data())
def test_regrown_links_are_missing_positive_and_counted(rows, columns, density, exponent, data):
    mask = masked(rows, columns, density, data.draw(st.integers(0, 2**31)))
    k = data.draw(st.integers(0, int((~mask).sum())))
    score = ch2_l3n(mask, None, 1)
    chosen = choose_missing(score, mask, k, exponent, KEYS)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == k
    assert not mask.flatten()[chosen].any()
    num_positive = int((score > 0).sum())
    assert int((score.flatten()[chosen] > 0).sum()) == min(k, num_positive)
    linked = (mask.any(1, keepdim=True) & mask.any(0) & ~mask & (score == 0)).flatten()
    assert int(linked[chosen].sum()) == min(max(0, k - num_positive), int(linked.sum()))


def test_regrowth_breaks_ties_of_positive_scores():
    mask = torch.eye(3, dtype=torch.bool)
    score = torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert choose_missing(score, mask, 3, None, KEYS, lambda positions: -positions.double()).tolist() == [1, 2, 3]
    assert choose_missing(score, mask, 3, None, KEYS, lambda positions: positions.double()).tolist() == [3, 5, 6]
    filled = choose_missing(score, mask, 6, None, KEYS, lambda positions: positions.double())
    assert filled.tolist() == [1, 2, 3, 5, 6, 7]
    with pytest.raises(AssertionError):
        choose_missing(score, mask, 3, 1.0, KEYS, lambda positions: positions.double())


def test_zero_scores_are_filled_in_order_and_uniformly():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True  # neurons 3 of both sides have no link
    score = torch.zeros(4, 4)
    score[0, 1] = 1.0
    taken = torch.zeros(16)
    for seed in range(2000):
        taken[choose_missing(score, mask, 3, 1.0, Keys(seed, 1, "up"))] += 1
    assert taken[1] == 2000
    linked = [2, 4, 6, 8, 9]
    assert taken[linked].sum() == 4000
    assert ((taken[linked] / 2000 - 0.4).abs() < 5 * math.sqrt(0.4 * 0.6 / 2000)).all()
    assert choose_missing(score, mask, 13, 1.0, KEYS).tolist() == (~mask).flatten().nonzero().flatten().tolist()
    with pytest.raises(AssertionError):
        choose_missing(score, mask, 14, 1.0, KEYS)
