"""First weights of a sparse layer, and of links that it grows later.

Rules: **keep** (the model's own weights, masked), **scaled** (the same over sqrt(d), which gives the outputs back the
variance that masking took), **swi** (000 eq. 11: normal, std gain / sqrt(d * in)) and **kaiming** (the dense one: std
gain / sqrt(in)). Each is a row of ``WEIGHTS``: the standard deviation of its weights. A new link draws from a normal
distribution with that deviation; under keep and scaled, whose own first weights are gone by then, from one as wide as
they were. Numbers come from ``Keys`` at a link's flat index, so that one link can be drawn alone. Rejected: filling the
dense weight and masking it, which draws a hundred numbers for each one kept, from a stream that differs by device.

The gain makes up for the activation before the layer: sqrt(2) where that is ReLU, which halves the second moment, 1
where nothing, a norm or anything else is. Letters in names: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_cht.topology.keys import Keys

_BLOCK = 1 << 20
"""positions drawn at a time"""


@dataclass(frozen=True)
class Scale:
    """What the width of a layer's first weights follows from."""

    num_inputs: int
    density: float
    """of the layer, in (0, 1]"""
    gain: float
    own_std: float
    """standard deviation of the model's own first weights, before masking (``own_std``)"""


WEIGHTS: dict[str, Callable[[Scale], float]] = {
    "keep": lambda scale: scale.own_std,
    "scaled": lambda scale: scale.own_std / math.sqrt(scale.density),
    "swi": lambda scale: scale.gain / math.sqrt(scale.density * scale.num_inputs),
    "kaiming": lambda scale: scale.gain / math.sqrt(scale.num_inputs),
}
"""rule -> standard deviation of the weights of links"""


def own_std(weight_OI: Tensor) -> float:
    """Root of the mean square of a dense weight (out, in): its deviation from 0, about which weights are drawn."""
    return float(weight_OI.detach().norm(dtype=torch.float32)) / math.sqrt(weight_OI.numel())


def draw(rule: str, index: Tensor, scale: Scale, keys: Keys) -> Tensor:
    """Weights of the links at the flat positions ``index``, fp32 and normal, for a start or for new links."""
    return keys.normal("weight", index).mul_(WEIGHTS[rule](scale))


@torch.no_grad()
def first_weight(rule: str, weight_OI: Tensor, mask_OI: Tensor, density: float, gain: float, keys: Keys) -> Tensor:
    """First weight of a layer, exactly 0 off the mask; a new tensor like ``weight_OI``.

    Args:
        rule: a name in ``WEIGHTS``.
        weight_OI: the model's own weight (out, in), dense.
        mask_OI: the first links, bool (out, in), on the same device.
        density: of this layer, in (0, 1].
        gain: of swi and kaiming; sqrt(2) where ReLU comes before, else 1.
        keys: random numbers of the layer.
    """
    if rule in ("keep", "scaled"):
        factor = 1 if rule == "keep" else 1 / math.sqrt(density)
        return torch.where(mask_OI, weight_OI * factor, 0)
    scale = Scale(weight_OI.shape[1], density, gain, own_std=0.0)
    weight = torch.zeros_like(weight_OI, memory_format=torch.contiguous_format)
    mask = mask_OI.reshape(-1)
    for begin in range(0, mask.numel(), _BLOCK):
        index = mask[begin : begin + _BLOCK].nonzero().squeeze(1) + begin
        weight.view(-1)[index] = draw(rule, index, scale, keys).to(weight.dtype)
    return weight
