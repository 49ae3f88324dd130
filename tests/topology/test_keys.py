"""Random keys: pure, uniform, unrelated to each other, and the same forever."""

import math

import pytest
import torch
from torch import Tensor

from llm_cht.topology.keys import Keys

KEYS = Keys(seed=7, update=3, layer="model.layers.0.mlp.up_proj")
NUM = 1 << 18
INDEX = torch.arange(NUM)


def excess(counts: Tensor) -> float:
    """Chi-square of equally likely counts, in standard deviations above its mean."""
    expected = counts.sum().item() / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    return (chi_square - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


def test_bits_never_change():
    index = torch.tensor([0, 1, 2, 1376, 45_088_767, 2**32 - 1])
    expected = [3438505177, 2936052720, 1400656804, 3471823190, 3319754104, 1066145138]
    assert KEYS.bits("regrow", index).tolist() == expected
    assert Keys(0, 0, "").bits("", index).tolist() == [
        3847951907,
        3078537892,
        885910610,
        917305352,
        391156898,
        1533674919,
    ]


def test_a_draw_depends_on_its_index_alone():
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(0))
    for draw in (KEYS.bits, KEYS.uniform, KEYS.gumbel, KEYS.normal):
        everything = draw("regrow", INDEX)
        assert torch.equal(draw("regrow", order), everything[order])
        assert torch.equal(draw("regrow", order[:5].view(5, 1)), everything[order[:5]].view(5, 1))
        assert draw("regrow", order[:0]).numel() == 0
    assert torch.equal(order.sort().values, INDEX), "the index was changed"


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift):
    assert abs(excess(torch.bincount((KEYS.bits("tie", INDEX) >> shift) & 255, minlength=256))) < 4


def test_neighbouring_indices_are_independent():
    top = KEYS.bits("tie", INDEX) >> 28
    for lag in (1, 8, 512, 1376):
        assert abs(excess(torch.bincount(16 * top[lag:] + top[:-lag], minlength=256))) < 4, lag


def test_a_flipped_bit_of_the_index_flips_half_of_the_bits():
    bits = KEYS.bits("tie", INDEX)
    for position in range(18):
        changed = bits ^ KEYS.bits("tie", INDEX ^ (1 << position))
        share = torch.stack([((changed >> out) & 1).float().mean() for out in range(32)])
        assert (share - 0.5).abs().max() < 0.01, position


@pytest.mark.parametrize(
    ("other", "purpose"),
    [
        (Keys(8, 3, KEYS.layer), "tie"),
        (Keys(7, 4, KEYS.layer), "tie"),
        (Keys(7, 3, "model.layers.1.mlp.up_proj"), "tie"),
        (KEYS, "regrow"),
    ],
)
def test_other_names_give_unrelated_draws(other, purpose):
    here, there = KEYS.uniform("tie", INDEX) - 0.5, other.uniform(purpose, INDEX) - 0.5
    correlation = 12 * (here * there).mean().item()
    assert abs(correlation) < 4 / math.sqrt(NUM)
    top = 16 * (KEYS.bits("tie", INDEX) >> 28) + (other.bits(purpose, INDEX) >> 28)
    assert abs(excess(torch.bincount(top, minlength=256))) < 4


def test_uniform_and_gumbel_have_their_distributions():
    uniform, gumbel = KEYS.uniform("tie", INDEX), KEYS.gumbel("tie", INDEX)
    assert uniform.dtype == gumbel.dtype == torch.float32
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert gumbel.isfinite().all()
    below = torch.exp(-torch.exp(-gumbel.double()))  # the distribution function of a Gumbel number is uniform
    assert abs(excess(torch.bincount((below * 64).long(), minlength=64))) < 4
    assert gumbel.max() > math.log(NUM) - 3  # the upper tail is there


def test_normal_has_its_distribution():
    normal = KEYS.normal("weight", INDEX)
    assert normal.dtype == torch.float32
    below = torch.special.ndtr(normal.double())  # uniform, like any distribution function
    assert abs(excess(torch.bincount((below * 64).long(), minlength=64))) < 4
    tail = int((normal.abs() > 4).sum())
    assert 2 <= tail <= 40  # 16.6 expected of 2**18
    assert abs((normal[1:] * normal[:-1]).mean().item()) < 4 / math.sqrt(NUM)
    assert abs((normal * KEYS.normal("other", INDEX)).mean().item()) < 4 / math.sqrt(NUM)


@pytest.mark.parametrize("bound", [1, 7, 4096, 2**31 - 1])
def test_whole_numbers_below_a_bound_are_uniform(bound):
    drawn = KEYS.below("row", INDEX, bound)
    assert drawn.dtype == torch.int64
    assert (int(drawn.min()), int(drawn.max())) >= (0, 0)
    assert int(drawn.max()) < bound
    cells = min(bound, 64)
    edges = [-(-bound * cell // cells) for cell in range(cells + 1)]
    counts = torch.histogram(drawn.double(), bins=torch.tensor(edges).double() - 0.5).hist
    expected = NUM * torch.tensor(edges).diff() / bound
    assert (counts - expected).abs().max() <= 5 * expected.max().sqrt()


def test_extreme_bits_stay_finite(monkeypatch):
    def extremes(index: Tensor, round_keys: tuple[int, ...], out: Tensor) -> Tensor:
        return out.copy_(index)

    monkeypatch.setattr("llm_cht.topology.keys._hash", extremes)
    index = torch.tensor([0, 1, 2**32 - 2, 2**32 - 1])
    assert KEYS.uniform("tie", index).min() > 0
    assert KEYS.uniform("tie", index).max() < 1
    gumbel = KEYS.gumbel("tie", index)
    assert gumbel.isfinite().all()
    assert gumbel[0] == pytest.approx(33 * math.log(2))
    normal = KEYS.normal("tie", index)
    assert normal.isfinite().all()
    assert normal.abs().max() < 6.8


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits():
    assert torch.equal(KEYS.bits("tie", INDEX.cuda()).cpu(), KEYS.bits("tie", INDEX))
    torch.testing.assert_close(KEYS.gumbel("tie", INDEX.cuda()).cpu(), KEYS.gumbel("tie", INDEX))
    torch.testing.assert_close(KEYS.normal("tie", INDEX.cuda()).cpu(), KEYS.normal("tie", INDEX), atol=1e-5, rtol=1e-4)
