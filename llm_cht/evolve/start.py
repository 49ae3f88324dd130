"""The first topology of a live model: masks with exact counts, and first weights that are 0 off them.

Drawn on the CPU from counter-based keys, so that it is the same on every device and rank.
"""

from __future__ import annotations

import torch

from llm_cht.errors import UserError
from llm_cht.sparse.surgery import SparseModel
from llm_cht.topology.initial import STARTS, InitialOptions, repair, unlinked
from llm_cht.topology.keys import Keys
from llm_cht.topology.method import Method


@torch.no_grad()
def draw_start(sparse: SparseModel, method: Method, seed: int) -> dict[str, int]:
    """Draw the first topology of a fresh model; weights of missing links become 0.

    The weights must be whole here: before ZeRO cuts them. Every rank draws the same.

    Returns:
        The number of neurons that start without a link: ``outputs`` and ``inputs``.

    Raises:
        UserError: the sparsity leaves a layer without a link; nothing is changed then.
    """
    settings = method.settings
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in sparse.layers.items()}
    targets = method.targets(shapes, 0)
    fewest = method.targets(shapes, method.updates.last_due)
    for name, shape in shapes.items():
        if min(targets[name].links, fewest[name].links) < 1:
            raise UserError(f"`method.sparsity` = {settings.sparsity} leaves no link in `{name}` {shape}; lower it")
    options = InitialOptions(settings.brf_r, settings.brf_degree)
    lonely = {"outputs": 0, "inputs": 0}
    for name, layer in sparse.layers.items():
        keys = Keys(seed, 0, name)
        mask = STARTS[settings.initial](shapes[name], targets[name].links, keys, options)
        if settings.repair:
            mask = repair(mask, keys)
        layer.set_mask(mask.to(layer.mask.device))
        outputs, inputs = unlinked(mask)
        lonely["outputs"] += outputs
        lonely["inputs"] += inputs
    return lonely
