"""First weights: their spread, what they do to activations, and that a link can be drawn alone."""

import math

import pytest
import torch

from llm_cht.topology.initial import Given, InitialOptions, er
from llm_cht.topology.keys import Keys
from llm_cht.topology.weights import WEIGHTS, Scale, draw, first_weight, own_std

SHAPE, DENSITY = (400, 600), 0.05


def keys(layer: str = "layer") -> Keys:
    return Keys(0, 0, layer)


def links(shape: tuple[int, int], density: float, layer: str = "layer") -> torch.Tensor:
    return er(shape, math.floor(density * shape[0] * shape[1] + 0.5), keys(layer), InitialOptions(0, "fixed"), Given())


@pytest.mark.parametrize(
    ("rule", "std"),
    [
        ("keep", 0.02),
        ("scaled", 0.02 / math.sqrt(0.05)),
        ("swi", math.sqrt(2 / (0.05 * 600))),
        ("kaiming", math.sqrt(2 / 600)),
    ],
)
def test_weights_of_links_have_the_spread_of_the_rule(rule: str, std: float):
    mask_OI = links(SHAPE, DENSITY)
    own_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.02
    before = own_OI.clone()
    weight_OI = first_weight(rule, own_OI, mask_OI, DENSITY, math.sqrt(2), keys())
    assert torch.equal(own_OI, before)
    assert (weight_OI.shape, weight_OI.dtype) == (SHAPE, torch.float32)
    assert torch.equal(weight_OI != 0, mask_OI)
    assert weight_OI[mask_OI].std().item() == pytest.approx(std, rel=0.03)
    assert WEIGHTS[rule](Scale(600, DENSITY, math.sqrt(2), own_std(own_OI))) == pytest.approx(std, rel=0.01)


def test_keep_and_scaled_by_hand():
    own_OI, mask_OI = torch.tensor([[2.0, -4.0], [6.0, 8.0]]), torch.tensor([[True, False], [False, True]])
    assert first_weight("keep", own_OI, mask_OI, 0.25, 1.0, keys()).tolist() == [[2, 0], [0, 8]]
    assert first_weight("scaled", own_OI, mask_OI, 0.25, 1.0, keys()).tolist() == [[4, 0], [0, 16]]
    assert own_std(own_OI) == pytest.approx(math.sqrt((4 + 16 + 36 + 64) / 4))


@pytest.mark.parametrize("rule", ["swi", "kaiming"])
def test_a_link_drawn_alone_gets_what_it_gets_among_all(rule: str):
    shape = (1500, 1000)  # more positions than a block holds
    mask_OI = links(shape, 0.02)
    weight_OI = first_weight(rule, torch.zeros(shape), mask_OI, 0.02, 1.0, keys())
    index = mask_OI.flatten().nonzero().squeeze(1)[[0, 7, 29_999]]
    scale = Scale(1000, 0.02, 1.0, own_std=0.0)
    assert torch.equal(draw(rule, index, scale, keys()), weight_OI.flatten()[index])
    later = draw(rule, index, scale, Keys(0, 1, "layer"))
    assert not torch.equal(later, weight_OI.flatten()[index]), "another update draws other numbers"


def test_a_short_type_stays():
    mask_OI = links(SHAPE, DENSITY)
    for rule in WEIGHTS:
        weight_OI = first_weight(rule, torch.ones(SHAPE, dtype=torch.bfloat16), mask_OI, DENSITY, 1.0, keys())
        assert weight_OI.dtype == torch.bfloat16
        assert not weight_OI[~mask_OI].any()


def second_moments(rule: str, seed: int, width: int = 1000, depth: int = 10) -> list[float]:
    """Mean square of the activations after each of ``depth`` ReLU layers at 99 % sparsity, over that of the input.

    The input is as ReLU would leave it; so pre-activations, of which ReLU keeps half, are compared with twice it.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, width, generator=generator).relu()
    first = x.square().mean().item()
    ratios = []
    for layer in range(depth):
        name = f"{seed}.{layer}"
        mask_OI = links((width, width), 0.01, name)
        x = (x @ first_weight(rule, torch.zeros(width, width), mask_OI, 0.01, math.sqrt(2), keys(name)).T).relu()
        ratios.append(x.square().mean().item() / first)
    return ratios


def test_swi_keeps_the_second_moment_through_ten_layers_and_kaiming_loses_it():
    ratios = torch.tensor([second_moments("swi", seed) for seed in range(8)]).mean(0)
    print("second moments under swi", ratios.tolist())
    assert ratios.tolist() == pytest.approx([1.0] * 10, rel=0.15)
    assert second_moments("kaiming", 0)[-1] < 1e-18  # a hundredth per layer
