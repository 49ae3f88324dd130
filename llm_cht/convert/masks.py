"""The masks of a converted checkpoint: drawn as a fresh run draws them, layer by layer, and kept packed.

A threshold over all layers (the global budget) is found exactly without having all scores at once: scores >= 0 are
ordered as the whole numbers that their 32 bits are, so two counts of 65,536 bins each, of the upper and of the lower
half, tell the k-th largest. Equal scores are decided the same way by their random bits. Rejected: a sample of scores
(not exact) and an external sort (the size of the model on disk again).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from llm_cht.convert.plan import Layers, as_options
from llm_cht.convert.source import Source
from llm_cht.errors import UserError
from llm_cht.topology.bits import PackedMasks, pack
from llm_cht.topology.budget import BUDGETS, budget_links
from llm_cht.topology.initial import STARTS, Given, InitialOptions
from llm_cht.topology.keys import Keys
from llm_cht.topology.percolate import percolate, with_dead_heads
from llm_cht.topology.score import SCORES

KEEP = {"magnitude": "magnitude", "ri": "relative_importance"}
"""scores by which the strongest weights are kept, and their names in ``SCORES``"""
DRAWS = ("er", "brf", "bsw", "bsf")
"""starts that look at no weight"""
ALL_BUDGETS = (*BUDGETS, "global")


def draw_masks(
    source: Source, layers: Layers, sparsity: float, by: str, budget: str, random: tuple[int, InitialOptions]
) -> PackedMasks:
    """Masks (out, in) with exactly the links that ``sparsity`` asks for; ``random``: seed and options of a start.

    Raises:
        UserError: a layer would get no link; a weight is not finite.
    """
    density = round(1 - sparsity, 12)  # as a run has it
    seed, options = random
    if budget == "global":
        total = math.floor(density * sum(map(math.prod, layers.shapes.values())) + 0.5)
        with _bar(5 * len(layers.shapes)) as bar:
            masks = strongest(lambda name: _score(source, layers, name, by, bar), layers.shapes, total, seed)
        for name in masks:
            if not masks.packed[name].any():
                raise UserError(f"--sparsity {sparsity} leaves no link in `{name}` under --budget global; lower it")
        return masks
    with as_options():
        links = budget_links(layers.shapes, density, budget)
    options = replace(options, pruning=KEEP.get(by, options.pruning))

    def drawn() -> Iterator[tuple[str, Tensor]]:
        with _bar(len(links)) as bar:
            for name, count in links.items():
                given = Given(weight_OI=_weight(source, layers, name)) if by in KEEP else Given()
                rule = STARTS["checkpoint" if by in KEEP else by]
                yield name, rule(layers.shapes[name], count, Keys(seed, 0, name), options, given)
                bar.update()

    return PackedMasks.of(drawn())


def strongest(score: Callable[[str], Tensor], shapes: Mapping[str, tuple[int, int]], k: int, seed: int) -> PackedMasks:
    """Masks of the ``k`` largest of the scores of all layers together, ties by random bits as in ``top_k``.

    ``score`` gives the fp32 scores >= 0 of a layer, (out, in); it is called five times for each.
    """
    threshold, num_tied = _kth(lambda: (_order(score(name)) for name in shapes), k)

    def tied_bits(name: str) -> tuple[Tensor, Tensor, Tensor]:
        order = _order(score(name))
        tied = (order == threshold).nonzero().squeeze(1)
        return order, tied, Keys(seed, 0, name).bits("tie", tied)

    last, rest = _kth(lambda: (tied_bits(name)[2] for name in shapes), num_tied)
    packed = {}
    for name in shapes:
        order, tied, tie = tied_bits(name)
        mask = order > threshold
        mask[tied[tie > last]] = True
        equal = tied[tie == last][:rest]  # bits may be equal, rarely; earlier layers and positions win
        mask[equal] = True
        rest -= len(equal)
        packed[name] = pack(mask)
    return PackedMasks(packed, shapes)


def percolated(masks: PackedMasks, layers: Layers, heads: bool = False) -> tuple[PackedMasks, int, int]:
    """Masks (out, in) without links that pass no signal; active and all neurons. ``heads``: without dead heads too."""
    active = neurons = 0
    packed: dict[str, Tensor] = {}
    for group in layers.groups:
        of_group = replace(group, units=with_dead_heads(group.units)) if heads else group
        new, some, total = percolate(of_group, {name: masks[name] for name in group.layers}, layers.biased)
        packed |= {name: pack(mask) for name, mask in new.items()}
        active, neurons = active + some, neurons + total
    return PackedMasks({name: packed[name] for name in masks}, masks.shapes), active, neurons


def _weight(source: Source, layers: Layers, name: str) -> Tensor:
    weight = source.tensors[f"{name}.weight"].floats()
    weight_OI = weight.T.contiguous() if name in layers.transposed else weight
    if not weight_OI.isfinite().all():
        raise UserError(f"{source.folder}: the weight of `{name}` is not finite everywhere; give a sound checkpoint")
    return weight_OI


def _score(source: Source, layers: Layers, name: str, by: str, bar: tqdm) -> Tensor:
    weight_OI = _weight(source, layers, name)
    everywhere = torch.ones((), dtype=torch.bool).expand(weight_OI.shape)
    bar.update()
    return SCORES[KEEP[by]](weight_OI, everywhere, None, 1.0)


def _order(score_OI: Tensor) -> Tensor:
    """Whole numbers, int64 (out * in,), in the order of fp32 scores >= 0."""
    return score_OI.contiguous().view(-1).view(torch.int32).long()


def _kth(parts: Callable[[], Iterable[Tensor]], k: int) -> tuple[int, int]:
    """The ``k`` th largest of whole numbers below 2**32, which come in parts; how many equal to it are among the k."""
    high, rest = _bin((part >> 16 for part in parts()), k)
    low, rest = _bin((part[part >> 16 == high] & 0xFFFF for part in parts()), rest)
    return (high << 16) | low, rest


def _bin(parts: Iterable[Tensor], k: int) -> tuple[int, int]:
    """The ``k`` th largest of whole numbers below 2**16, and how many equal to it are among the k."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts:
        counts += torch.bincount(part, minlength=1 << 16)
    reached = counts.flip(0).cumsum(0)  # how many are at least so large, from the largest down
    place = int(torch.searchsorted(reached, k))
    value = len(counts) - 1 - place
    return value, k - int(reached[place] - counts[value])


def _bar(total: int) -> tqdm:
    return tqdm(total=total, desc="masks", unit=" layers", dynamic_ncols=True, disable=None)
