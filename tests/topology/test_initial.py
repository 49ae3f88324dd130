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
from llm_cht.topology.initial import BLOCK, STARTS, InitialOptions, brf, er, repair, unlinked
from llm_cht.topology.keys import Keys

FIXED = InitialOptions(0.2, "fixed")


def keys(seed: int = 0) -> Keys:
    return Keys(seed, 0, "layer")


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    density=st.floats(0, 1),
    start=st.sampled_from(sorted(STARTS)),
    options=st.builds(InitialOptions, st.sampled_from([0, 0.05, 0.2, 0.7, 1]), st.sampled_from(["fixed", "uniform"])),
)
def test_counts_are_exact(shape: tuple[int, int], density: float, start: str, options: InitialOptions):
    links = num_links(shape, density)
    mask_OI = STARTS[start](shape, links, keys(), options)
    assert (mask_OI.shape, mask_OI.dtype) == (shape, torch.bool)
    assert int(mask_OI.sum()) == links
    if start == "brf" and options.brf_degree == "fixed":
        assert set(mask_OI.sum(1).tolist()) <= {links // shape[0], -(-links // shape[0])}
    if start == "brf" and links >= shape[0]:
        assert mask_OI.any(1).all()


@pytest.mark.parametrize("start", sorted(STARTS))
def test_the_same_keys_give_the_same_mask(start: str):
    def draw(key: Keys) -> Tensor:
        return STARTS[start]((20, 30), 100, key, FIXED)

    assert torch.equal(draw(keys(1)), draw(keys(1)))
    assert not torch.equal(draw(keys(1)), draw(keys(2)))
    assert not torch.equal(draw(keys(1)), draw(Keys(1, 0, "other layer")))


@pytest.mark.parametrize("links", [2, 4])
def test_er_draws_every_set_of_links_equally_often(links: int):
    """Chi-square over all sets of 2, and of 4 (drawn as the 2 missing links), of 6 positions."""
    sets = dict.fromkeys(itertools.combinations(range(6), links), 0)
    num_draws = 3000
    for seed in range(num_draws):
        sets[tuple(er((2, 3), links, keys(seed), FIXED).flatten().nonzero().squeeze(1).tolist())] += 1
    expected = num_draws / len(sets)
    chi_square = sum((count - expected) ** 2 / expected for count in sets.values())
    assert chi_square < 36.1  # 99.9 % quantile at 14 degrees of freedom


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (7, 11), (11, 7)])
def test_brf_without_randomness_takes_the_nearest_inputs_around_the_ring(shape: tuple[int, int]):
    degree = 3
    mask_OI = brf(shape, degree * shape[0], keys(), InitialOptions(0, "fixed"))
    num_outputs, num_inputs = shape
    for output, row in enumerate(mask_OI):
        centre = (output + 0.5) * num_inputs / num_outputs - 0.5
        distance = sorted(min(abs(i - centre), num_inputs - abs(i - centre)) for i in range(num_inputs))
        chosen = row.nonzero().squeeze(1).tolist()
        got = sorted(min(abs(i - centre), num_inputs - abs(i - centre)) for i in chosen)
        assert got == pytest.approx(distance[:degree])


def test_brf_by_hand():
    # centres at 0.5, 2.5, 4.5: two links each, no ties
    mask_OI = brf((3, 6), 6, keys(), InitialOptions(0, "fixed"))
    assert mask_OI.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    # four each: around the ring from 0 to 5 and from 5 to 0
    mask_OI = brf((3, 6), 12, keys(), InitialOptions(0, "fixed"))
    assert mask_OI.int().tolist() == [[1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]


def test_equally_near_inputs_are_equally_likely():
    # output 0 of (4, 4) sits on input 0; its second link is input 1 or 3
    second = [brf((4, 4), 8, keys(seed), InitialOptions(0, "fixed"))[0].tolist() for seed in range(400)]
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
        for output, row in enumerate(brf((6, 6), 12, keys(seed), InitialOptions(r, "fixed"))):
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
    mask_OI = brf(shape, links, keys(), InitialOptions(r, degree))
    assert int(mask_OI.sum()) == links
    assert unlinked(mask_OI) == (0, 0)


def test_brf_at_full_randomness_has_the_input_degrees_of_er():
    shape, links = (400, 300), 12000
    degrees = {}
    for name, start in STARTS.items():
        degree_I = start(shape, links, keys(), InitialOptions(1, "fixed")).sum(0).double()
        degrees[name] = degree_I
        # binomial: mean 40, variance 40 * 0.9
        assert degree_I.mean() == pytest.approx(40)
        assert degree_I.var().item() == pytest.approx(36, rel=0.35)
    distances = [_mean_distance(start(shape, links, keys(), InitialOptions(1, "fixed"))) for start in STARTS.values()]
    assert distances == pytest.approx([75, 75], rel=0.02)  # a quarter of the ring


def _mean_distance(mask_OI: Tensor) -> float:
    outputs, inputs = mask_OI.nonzero(as_tuple=True)
    away = (inputs - ((outputs + 0.5) * mask_OI.shape[1] / mask_OI.shape[0] - 0.5)).abs()
    return torch.minimum(away, mask_OI.shape[1] - away).mean().item()


def test_links_reach_further_the_larger_r():
    masks = [brf((200, 300), 3000, keys(), InitialOptions(r, "fixed")) for r in (0, 0.1, 0.2, 0.3, 0.5, 1)]
    distances = [_mean_distance(mask_OI) for mask_OI in masks]
    assert distances == sorted(distances)
    assert distances[0] < 4.1 < 60 < distances[-1]


def test_uniform_degrees_fill_their_range():
    # mean 30 of 200 inputs: 1 to 59
    degree_O = brf((1000, 200), 30_000, keys(), InitialOptions(0.2, "uniform")).sum(1)
    assert (degree_O.min(), degree_O.max()) == (1, pytest.approx(59, abs=2))
    counts = torch.histc(degree_O.double(), bins=4, min=0.5, max=60.5)
    assert counts.tolist() == pytest.approx([250] * 4, rel=0.25)
    # mean 180 of 200: 160 to 200
    degree_O = brf((1000, 200), 180_000, keys(), InitialOptions(0.2, "uniform")).sum(1)
    assert degree_O.min() >= 158
    assert degree_O.max() == 200


def test_which_outputs_get_the_odd_links_is_random():
    odd = [brf((10, 8), 25, keys(seed), FIXED).sum(1) == 3 for seed in range(200)]
    assert all(int(one.sum()) == 5 for one in odd)
    assert torch.stack(odd).sum(0).tolist() == pytest.approx([100] * 10, abs=30)


def test_blocks_leave_no_seam():
    """A layer of more than one block: er draws further rounds, brf goes on with the next rows."""
    shape = (3000, 700)
    assert shape[0] * shape[1] > 2 * BLOCK
    for start in STARTS.values():
        mask_OI = start(shape, 1_050_000, keys(), InitialOptions(1, "fixed"))
        assert int(mask_OI.sum()) == 1_050_000
        halves = [int(half.sum()) for half in mask_OI.chunk(2)]
        assert halves == pytest.approx([525_000] * 2, rel=0.01)


def test_unlinked_by_hand():
    mask_OI = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.bool)
    assert unlinked(mask_OI) == (1, 2)
    assert unlinked(torch.ones(2, 3, dtype=torch.bool)) == (0, 0)


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=st.integers(0, 1000), extra=st.integers(0, 60))
def test_repair_links_every_neuron_and_moves_no_more_than_it_must(shape: tuple[int, int], seed: int, extra: int):
    links = min(sum(shape) + extra, shape[0] * shape[1])
    before = er(shape, links, keys(seed), FIXED)
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
@pytest.mark.parametrize("start", sorted(STARTS))
def test_large_layers_take_seconds_and_bounded_memory(start: str):
    """LLaMA-7B's down projection, in a process of its own, whose peak memory then is this draw's."""
    import subprocess
    import sys

    code = (
        "import resource, torch\n"
        "from llm_cht.topology.initial import STARTS, InitialOptions\n"
        "from llm_cht.topology.keys import Keys\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        f"def draw(shape, n): return STARTS['{start}'](shape, n, Keys(0, 0, 'a'), InitialOptions(0.2, 'fixed'))\n"
        "draw((64, 64), 400)\n"
        "before = peak()\n"
        "mask = draw((4096, 11008), 4508877)\n"
        "extra = peak() - before\n"
        "assert int(mask.count_nonzero()) == 4508877\n"
        "print(extra)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert math.floor(float(done.stdout)) < 400  # MiB, of which the mask takes 43
