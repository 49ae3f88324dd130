"""First topologies: exact counts, the distributions they are drawn from, neurons without a link and their repair."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology.budget import num_links
from llm_cht.topology.correlated import correlation
from llm_cht.topology.initial import (
    BLOCK,
    STARTS,
    Given,
    InitialOptions,
    brf,
    bsw,
    checkpoint,
    er,
    file,
    repair,
    unlinked,
)
from llm_cht.topology.keys import Keys
from llm_cht.topology.measure import clustering

FIXED = InitialOptions(0.2, "fixed")
NOTHING = Given()


def keys(seed: int = 0) -> Keys:
    return Keys(seed, 0, "layer")


def given_for(shape: tuple[int, int], links: int) -> Given:
    """What every start can be made of."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(shape, generator=generator)
    samples_NI = torch.randn(7, shape[1], generator=generator)
    return Given(weight_OI, correlation(samples_NI), er(shape, links, keys(99), FIXED, NOTHING))


@settings(deadline=None, max_examples=300)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    density=st.floats(0, 1),
    start=st.sampled_from(sorted(STARTS)),
    options=st.builds(
        InitialOptions,
        brf_r=st.sampled_from([0, 0.05, 0.2, 0.7, 1]),
        brf_degree=st.sampled_from(["fixed", "uniform"]),
        bsw_beta=st.sampled_from([0, 0.25, 1]),
        bsf_equal_partition=st.booleans(),
        bsf_resort=st.booleans(),
        pruning=st.sampled_from(["magnitude", "relative_importance"]),
    ),
)
def test_counts_are_exact(shape: tuple[int, int], density: float, start: str, options: InitialOptions):
    if start == "csti":
        shape = (shape[0] // 8 + 1) * (shape[1] + 1), shape[1] + 1
    links = num_links(shape, density)
    mask_OI = STARTS[start](shape, links, keys(), options, given_for(shape, links))
    assert (mask_OI.shape, mask_OI.dtype) == (shape, torch.bool)
    assert int(mask_OI.sum()) == links
    if start == "brf" and options.brf_degree == "fixed":
        assert set(mask_OI.sum(1).tolist()) <= {links // shape[0], -(-links // shape[0])}
    if start == "brf" and links >= shape[0]:
        assert mask_OI.any(1).all()


@pytest.mark.parametrize("start", sorted(STARTS))
def test_the_same_keys_give_the_same_mask(start: str):
    shape = (60, 30)
    given = given_for(shape, 300)

    def draw(key: Keys) -> Tensor:
        return STARTS[start](shape, 300, key, FIXED, given)

    assert torch.equal(draw(keys(1)), draw(keys(1)))
    if start not in ("csti", "file", "checkpoint"):  # random but for ties
        assert not torch.equal(draw(keys(1)), draw(keys(2)))
        assert not torch.equal(draw(keys(1)), draw(Keys(1, 0, "other layer")))


@pytest.mark.parametrize("links", [2, 4])
def test_er_draws_every_set_of_links_equally_often(links: int):
    """Chi-square over all sets of 2, and of 4 (drawn as the 2 missing links), of 6 positions."""
    sets = dict.fromkeys(itertools.combinations(range(6), links), 0)
    num_draws = 3000
    for seed in range(num_draws):
        sets[tuple(er((2, 3), links, keys(seed), FIXED, NOTHING).flatten().nonzero().squeeze(1).tolist())] += 1
    expected = num_draws / len(sets)
    chi_square = sum((count - expected) ** 2 / expected for count in sets.values())
    assert chi_square < 36.1  # 99.9 % quantile at 14 degrees of freedom


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (7, 11), (11, 7)])
def test_brf_without_randomness_takes_the_nearest_inputs_around_the_ring(shape: tuple[int, int]):
    degree = 3
    mask_OI = brf(shape, degree * shape[0], keys(), InitialOptions(0, "fixed"), NOTHING)
    num_outputs, num_inputs = shape
    for output, row in enumerate(mask_OI):
        centre = (output + 0.5) * num_inputs / num_outputs - 0.5
        distance = sorted(min(abs(i - centre), num_inputs - abs(i - centre)) for i in range(num_inputs))
        chosen = row.nonzero().squeeze(1).tolist()
        got = sorted(min(abs(i - centre), num_inputs - abs(i - centre)) for i in chosen)
        assert got == pytest.approx(distance[:degree])


def test_brf_by_hand():
    # centres at 0.5, 2.5, 4.5: two links each, no ties
    mask_OI = brf((3, 6), 6, keys(), InitialOptions(0, "fixed"), NOTHING)
    assert mask_OI.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    # four each: around the ring from 0 to 5 and from 5 to 0
    mask_OI = brf((3, 6), 12, keys(), InitialOptions(0, "fixed"), NOTHING)
    assert mask_OI.int().tolist() == [[1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]


def test_equally_near_inputs_are_equally_likely():
    # output 0 of (4, 4) sits on input 0; its second link is input 1 or 3
    second = [brf((4, 4), 8, keys(seed), InitialOptions(0, "fixed"), NOTHING)[0].tolist() for seed in range(400)]
    assert all(row[0] and not row[2] for row in second)
    assert 160 < sum(row[1] for row in second) < 240


@pytest.mark.parametrize("r", [0.2, 0.5, 1])
def test_brf_samples_by_distance_without_replacement(r: float):
    """Chi-square against exact set probabilities: 2 of 6 inputs, at distances 0, 1, 2, 3, 2, 1 of their output."""
    weight = [(1 + x) ** (-(1 - r) / r) for x in (0, 1, 2, 3, 2, 1)]
    exact = dict.fromkeys(itertools.combinations(range(6), 2), 0.0)
    for first, second in itertools.permutations(range(6), 2):
        odds = weight[first] / sum(weight) * weight[second] / (sum(weight) - weight[first])
        exact[min(first, second), max(first, second)] += odds
    counts = dict.fromkeys(exact, 0)
    num_draws = 0
    for seed in range(600):
        for output, row in enumerate(brf((6, 6), 12, keys(seed), InitialOptions(r, "fixed"), NOTHING)):
            distances = sorted((input_ - output) % 6 for input_ in row.nonzero().squeeze(1).tolist())
            counts[tuple(distances)] += 1
            num_draws += 1
    # rare sets are pooled, for a chi-square wants at least 5 of each
    common = [pair for pair in exact if exact[pair] * num_draws >= 5]
    pairs = [(counts[pair], exact[pair] * num_draws) for pair in common]
    rest = num_draws - sum(count for count, _ in pairs), num_draws - sum(expected for _, expected in pairs)
    pairs += [rest] if rest[1] >= 5 else []
    chi_square = sum((count - expected) ** 2 / expected for count, expected in pairs)
    assert chi_square < 36.1  # 99.9 % quantile at 14 degrees of freedom


@pytest.mark.parametrize("degree", ["fixed", "uniform"])
@pytest.mark.parametrize("r", [0, 0.1, 0.3])
@pytest.mark.parametrize("shape", [(512, 1376), (1376, 512)])
def test_brf_leaves_no_neuron_unlinked_at_five_percent(shape: tuple[int, int], r: float, degree: str):
    links = num_links(shape, 0.05)
    mask_OI = brf(shape, links, keys(), InitialOptions(r, degree), NOTHING)
    assert int(mask_OI.sum()) == links
    assert unlinked(mask_OI) == (0, 0)


def test_brf_at_full_randomness_has_the_input_degrees_of_er():
    shape, links = (400, 300), 12000
    for start in (er, brf):
        mask_OI = start(shape, links, keys(), InitialOptions(1, "fixed"), NOTHING)
        degree_I = mask_OI.sum(0).double()
        # binomial: mean 40, variance 40 * 0.9
        assert degree_I.mean() == pytest.approx(40)
        assert degree_I.var().item() == pytest.approx(36, rel=0.35)
        assert _mean_distance(mask_OI) == pytest.approx(75, rel=0.02)  # a quarter of the ring


def _mean_distance(mask_OI: Tensor) -> float:
    outputs, inputs = mask_OI.nonzero(as_tuple=True)
    away = (inputs - ((outputs + 0.5) * mask_OI.shape[1] / mask_OI.shape[0] - 0.5)).abs()
    return torch.minimum(away, mask_OI.shape[1] - away).mean().item()


def test_links_reach_further_the_larger_r():
    masks = [brf((200, 300), 3000, keys(), InitialOptions(r, "fixed"), NOTHING) for r in (0, 0.1, 0.2, 0.3, 0.5, 1)]
    distances = [_mean_distance(mask_OI) for mask_OI in masks]
    assert distances == sorted(distances)
    assert distances[0] < 4.1 < 60 < distances[-1]


def test_uniform_degrees_fill_their_range():
    # mean 30 of 200 inputs: 1 to 59
    degree_O = brf((1000, 200), 30_000, keys(), InitialOptions(0.2, "uniform"), NOTHING).sum(1)
    assert (degree_O.min(), degree_O.max()) == (1, pytest.approx(59, abs=2))
    counts = torch.histc(degree_O.double(), bins=4, min=0.5, max=60.5)
    assert counts.tolist() == pytest.approx([250] * 4, rel=0.25)
    # mean 180 of 200: 160 to 200
    degree_O = brf((1000, 200), 180_000, keys(), InitialOptions(0.2, "uniform"), NOTHING).sum(1)
    assert degree_O.min() >= 158
    assert degree_O.max() == 200


def test_which_outputs_get_the_odd_links_is_random():
    odd = [brf((10, 8), 25, keys(seed), FIXED, NOTHING).sum(1) == 3 for seed in range(200)]
    assert all(int(one.sum()) == 5 for one in odd)
    assert torch.stack(odd).sum(0).tolist() == pytest.approx([100] * 10, abs=30)


def test_blocks_leave_no_seam():
    """A layer of more than one block: er draws further rounds, brf goes on with the next rows."""
    shape = (3000, 700)
    assert shape[0] * shape[1] > 2 * BLOCK
    for start in (er, brf, bsw):
        mask_OI = start(shape, 1_050_000, keys(), InitialOptions(1, "fixed"), NOTHING)
        assert int(mask_OI.sum()) == 1_050_000
        halves = [int(half.sum()) for half in mask_OI.chunk(2)]
        assert halves == pytest.approx([525_000] * 2, rel=0.01)


def rewired(beta: float) -> InitialOptions:
    return InitialOptions(0.2, "uniform", bsw_beta=beta)


@pytest.mark.parametrize(("shape", "links"), [((30, 40), 200), ((40, 30), 1000), ((7, 5), 35), ((2000, 900), 90_000)])
def test_bsw_lies_between_the_nearest_inputs_and_er(shape: tuple[int, int], links: int):
    nearest = brf(shape, links, keys(), InitialOptions(0, "fixed"), NOTHING)
    assert torch.equal(bsw(shape, links, keys(), rewired(0), NOTHING), nearest)
    assert torch.equal(bsw(shape, links, keys(), rewired(1), NOTHING), er(shape, links, keys(), FIXED, NOTHING))


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.7])
def test_bsw_moves_the_share_beta_of_the_links(beta: float):
    shape, links = (1000, 800), 16_000
    nearest = bsw(shape, links, keys(), rewired(0), NOTHING)
    stayed = int((nearest & bsw(shape, links, keys(), rewired(beta), NOTHING)).sum()) / links
    assert stayed == pytest.approx(1 - beta + beta * 0.02, abs=0.015)  # a few fall on a place left free


def test_clustering_falls_with_beta():
    shape, links = (400, 300), 6000
    values = [clustering(bsw(shape, links, keys(), rewired(beta), NOTHING)) for beta in (0, 0.1, 0.25, 0.5, 1)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.5
    assert values[-1] == pytest.approx(0.05, rel=0.15)  # the density, as in any random mask


def test_few_free_positions_are_found_and_used_evenly():
    """All links but 3 of 200: bsw draws among a hundredth of the positions, where it enumerates them."""
    counts = torch.zeros(10, 20)
    for seed in range(400):
        counts += ~bsw((10, 20), 197, keys(seed), rewired(0.01), NOTHING)
    assert int(counts.sum()) == 1200
    assert (counts.sum(1) - 120).abs().max() < 60


def test_a_file_is_taken_as_it_is_or_refused():
    mask_OI = er((4, 5), 8, keys(), FIXED, NOTHING)
    assert torch.equal(file((4, 5), 8, keys(), FIXED, Given(mask_OI=mask_OI)), mask_OI)
    with pytest.raises(UserError, match=r"`layer` has 8 links, the method asks for 9; set `method.sparsity` .*0\.6\)"):
        file((4, 5), 9, keys(), FIXED, Given(mask_OI=mask_OI))
    with pytest.raises(UserError, match=r"mask of `layer` is \(4, 5\), the layer \(5, 4\); give"):
        file((5, 4), 8, keys(), FIXED, Given(mask_OI=mask_OI))


def test_a_checkpoint_keeps_its_largest_weights():
    weight_OI = torch.tensor([[9.0, -8.0, 7.0], [0.5, -1.0, 0.1]])
    largest = checkpoint((2, 3), 3, keys(), FIXED, Given(weight_OI=weight_OI))
    assert largest.int().tolist() == [[1, 1, 1], [0, 0, 0]]
    # relative importance: 9/24 + 9/9.5, 8/24 + 8/9, 7/24 + 7/7.1; 0.5/1.6 + 0.5/9.5, 1/1.6 + 1/9, 0.1/1.6 + 0.1/7.1
    important = InitialOptions(0.2, "fixed", pruning="relative_importance")
    assert checkpoint((2, 3), 4, keys(), important, Given(weight_OI=weight_OI)).int().tolist() == [[1, 1, 1], [0, 1, 0]]
    tied = [checkpoint((2, 3), 1, keys(seed), FIXED, Given(weight_OI=torch.ones(2, 3))) for seed in range(300)]
    assert torch.stack(tied).sum(0).flatten().tolist() == pytest.approx([50] * 6, abs=25)
    with pytest.raises(UserError, match="`layer` is not finite everywhere; give a sound one"):
        checkpoint((1, 2), 1, keys(), FIXED, Given(weight_OI=torch.tensor([[1.0, math.nan]])))


def test_unlinked_by_hand():
    mask_OI = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.bool)
    assert unlinked(mask_OI) == (1, 2)
    assert unlinked(torch.ones(2, 3, dtype=torch.bool)) == (0, 0)


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=st.integers(0, 1000), extra=st.integers(0, 60))
def test_repair_links_every_neuron_and_moves_no_more_than_it_must(shape: tuple[int, int], seed: int, extra: int):
    links = min(sum(shape) + extra, shape[0] * shape[1])
    before = er(shape, links, keys(seed), FIXED, NOTHING)
    given_mask = before.clone()
    after = repair(before, keys(seed))
    assert torch.equal(before, given_mask)
    assert int(after.sum()) == links
    assert unlinked(after) == (0, 0)
    assert int((after & ~before).sum()) == max(unlinked(before))
    if unlinked(before) == (0, 0):
        assert torch.equal(after, before)


def test_repair_refuses_what_cannot_be():
    lonely = torch.zeros(4, 4, dtype=torch.bool)
    lonely[0, :3] = True
    with pytest.raises(UserError, match=r"`method.repair`: 3 links .* `layer` \(4, 4\); lower `method.sparsity`"):
        repair(lonely, keys())


def test_repair_of_one_row_that_holds_everything():
    crowded = torch.zeros(4, 9, dtype=torch.bool)
    crowded[0] = True
    crowded[1, :3] = True
    after = repair(crowded, keys())
    assert unlinked(after) == (0, 0)
    assert int(after.sum()) == 12


@pytest.mark.slow
@pytest.mark.parametrize("start", ["er", "brf", "bsw", "bsf", "checkpoint"])
def test_large_layers_take_seconds_and_bounded_memory(start: str):
    """LLaMA-7B's down projection, in a process of its own, whose peak memory then is this draw's."""
    import subprocess
    import sys

    code = (
        "import resource, torch\n"
        "from llm_cht.topology.initial import STARTS, Given, InitialOptions\n"
        "from llm_cht.topology.keys import Keys\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def draw(shape, n):\n"
        "    options, given = InitialOptions(0.2, 'fixed'), Given(weight[:shape[0], :shape[1]])\n"
        f"    return STARTS['{start}'](shape, n, Keys(0, 0, 'a'), options, given)\n"
        "weight = torch.randn(4096, 11008)\n"
        "draw((64, 64), 400)\n"
        "before = peak()\n"
        "mask = draw((4096, 11008), 4508877)\n"
        "extra = peak() - before\n"
        "assert int(mask.count_nonzero()) == 4508877\n"
        "print(extra)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert math.floor(float(done.stdout)) < 400  # MiB, of which the mask takes 43
