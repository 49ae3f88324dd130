"""The one topology update that all methods run, on a group of layers; pure: tensors in, masks and counts out.

Order (papers 000 and 002): density decay, removal, percolation, regrowth to the scheduled count. What follows from a
new mask (weights, moments, history) is done by ``llm_cht.evolve``. No branch on the name of a method or a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llm_cht.topology.keys import Keys
from llm_cht.topology.link import LINK_SCORES, NEEDS_MOMENTUM, PREDICTORS
from llm_cht.topology.method import Method, Target
from llm_cht.topology.percolate import Group, QueryKey, percolate, with_dead_heads
from llm_cht.topology.score import SCORES, Scored
from llm_cht.topology.select import choose, choose_missing
from llm_cht.topology.subrank import subrank


@dataclass(frozen=True)
class Moment:
    """When an update happens, as far as its rules and random keys are concerned."""

    step: int
    update: int
    seed: int


@dataclass(frozen=True)
class LayerChange:
    """What an update did to one layer; counts of links."""

    mask: Tensor
    pruned: int
    removed: int
    percolated: int
    regrown: int
    """by link prediction, or back from the memory of pruned links"""
    returned: int
    """taken away by removal or percolation and regrown in the same update"""


@dataclass(frozen=True)
class Inputs:
    """What an update of a group looks at, by layer; nothing of it is changed."""

    weights: Mapping[str, Tensor]
    """fp32 (out, in), 0 off the mask"""
    masks: Mapping[str, Tensor]
    """bool (out, in)"""
    targets: Mapping[str, Target]
    """links after the update"""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 (out, in) of the dense weight; there if the method ``needs_gradient``"""
    momenta: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 (out, in), the gradient averaged over steps; there if the method ``needs_momentum``"""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 (out, in), last weights of links that existed, 0 elsewhere; there if the method remembers them"""
    has_bias: frozenset[str] = frozenset()
    """layers with a bias"""
    stopped: frozenset[str] = frozenset()
    """layers that evolve no longer (early stop)"""
    prune_only: bool = False
    """leave out removal and regrowth, for lack of a gradient"""


def update_group(method: Method, group: Group, inputs: Inputs, moment: Moment) -> dict[str, LayerChange]:
    """One topology update of the layers of ``group``.

    Args:
        method: what to do.
        group: the layers' names and percolation units.
        inputs: of the group's layers.
        moment: step, number of the update and seed of the run.

    Returns:
        The new mask of each layer, which has exactly its target of links, and the counts.

    Raises:
        UserError: a rule lacks its input or breaks its contract.
    """
    layers = [_Layer(method, name, inputs, moment, _heads(method, group, name)) for name in group.layers]
    decayed = {layer.name: layer.decayed() for layer in layers}
    if inputs.prune_only or not method.evolves(moment.step):
        return {layer.name: _change(layer.mask, [decayed[layer.name]] * 4) for layer in layers}
    kept = {
        layer.name: decayed[layer.name] if layer.name in inputs.stopped else layer.removed(decayed[layer.name])
        for layer in layers
    }
    passing: Mapping[str, Tensor] = kept
    if method.settings.percolate:
        passing = percolate(_units(group, method.settings), kept, _biased(method, inputs.has_bias))[0]
    changes = {}
    for layer in layers:
        name = layer.name
        stages = [decayed[name], kept[name], passing[name]]
        if name in inputs.stopped:  # its dead neurons count for the others, but it keeps its links
            stages = [decayed[name]] * 3
        changes[name] = _change(layer.mask, [*stages, layer.regrown(stages[-1], decayed[name])])
    return changes


def active_neurons(
    method: Method, group: Group, masks: Mapping[str, Tensor], has_bias: frozenset[str]
) -> tuple[int, int]:
    """Active and all neurons of the group's units after a trial percolation (002's ANP is their ratio)."""
    _, active, total = percolate(_units(group, method.settings), masks, _biased(method, has_bias))
    return active, total


def pruning_candidates(method: Method, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Flat indices of the links that density decay compares, and their scores; with the remembered ones (GMP)."""
    weight, mask, rule = inputs.weights[name], inputs.masks[name], method.settings.pruning
    if method.settings.pruning_memory:
        memory = inputs.memory[name]
        weight = torch.where(mask, weight, memory)
        mask = mask | (memory != 0)
    scored = Scored(f"`method.pruning` = {rule}", name, SCORES[rule](weight, mask, None, 1.0), mask)
    return _scores_of_links(scored)


class _Layer:
    """One layer in an update: a method per stage, each from mask to mask."""

    def __init__(self, method: Method, name: str, inputs: Inputs, moment: Moment, heads: int) -> None:
        self.method, self.name, self.inputs, self.moment = method, name, inputs, moment
        self.heads = heads
        """blocks of rows that are evolved apart"""
        self.mask = inputs.masks[name]
        self.target = inputs.targets[name]

    def decayed(self) -> Tensor:
        """Prune to the target; where removal alone shrinks a layer nothing is pruned."""
        remembers = self.method.settings.pruning_memory
        if self.target.kept is not None or (not remembers and int(self.mask.count_nonzero()) <= self.target.links):
            return self.mask
        links, scores = pruning_candidates(self.method, self.name, self.inputs)
        chosen = choose(scores, self.target.links, None, self._keys(None), "prune", links)
        return _mask_of(links[chosen], self.mask)

    def removed(self, mask: Tensor) -> Tensor:
        """Remove zeta of the links, or down to the target's floor, hard or soft."""
        settings = self.method.settings
        zeta = self.method.zeta(self.moment.step)
        exponent = self.method.temperature(self.moment.step) if settings.removal_choice == "soft" else None
        weight, gradient = self.inputs.weights[self.name], self.inputs.gradients.get(self.name)
        if mask is not self.mask:
            weight = weight * mask  # relative importance adds up existing links only
        counts = self._counts(mask)
        keep = [count - math.floor(zeta * count + 1e-9) for count in counts]  # 0.7 * 90 is 62.99...
        if self.target.kept is not None:
            keep = _shares(min(self.target.kept, sum(counts)), counts)

        def remove(rows: slice, head: int) -> Tensor:
            part = mask[rows]
            slope = None if gradient is None else gradient[rows]
            score = SCORES[settings.removal](weight[rows], part, slope, settings.removal_alpha)
            links, scores = _scores_of_links(Scored(f"`method.removal` = {settings.removal}", self.name, score, part))
            return _mask_of(links[choose(scores, keep[head], exponent, self._keys(head), "remove", links)], part)

        return self._by_head(remove)

    def regrown(self, mask: Tensor, decayed: Tensor) -> Tensor:
        """Grow missing links up to the target; each head up to what it had."""
        settings, rule = self.method.settings, self.method.regrowth(self.moment.step)
        delta = settings.regrowth_delta
        exponent = delta / (1 - delta) if settings.regrowth_choice == "soft" else None
        slopes = self.inputs.momenta if rule in NEEDS_MOMENTUM else self.inputs.gradients
        slope = slopes.get(self.name)
        wanted = _shares(self.target.links, self._counts(decayed))

        def grow(rows: slice, head: int) -> Tensor:
            part = mask[rows]
            missing = wanted[head] - int(part.count_nonzero())
            if missing == 0:
                return part
            score = PREDICTORS[rule](part, None if slope is None else slope[rows], settings.workspace_mb)
            scored = Scored(f"`method.regrowth` = {rule}", self.name, score, part)
            scored.check_range(score)
            scored.check_zero_on_links()
            grown = part.clone()
            ties = self._subrank(part, rule) if settings.ties == "subrank" else None
            grown.view(-1)[choose_missing(score, part, missing, exponent, self._keys(head), ties)] = True
            return grown

        return self._by_head(grow)

    def _subrank(self, mask: Tensor, rule: str) -> Callable[[Tensor], Tensor]:
        """Second scores of missing links that are tied (000, App. N)."""
        workspace_mb = self.method.settings.workspace_mb
        return lambda positions: subrank(mask, LINK_SCORES[rule](mask, workspace_mb), positions)

    def _counts(self, mask: Tensor) -> list[int]:
        return [int(part.count_nonzero()) for part in mask.chunk(self.heads)]

    def _by_head(self, work: Callable[[slice, int], Tensor]) -> Tensor:
        if self.heads == 1:
            return work(slice(None), 0)
        height = len(self.mask) // self.heads
        return torch.cat([work(slice(h * height, (h + 1) * height), h) for h in range(self.heads)])

    def _keys(self, head: int | None) -> Keys:
        name = self.name if head is None or self.heads == 1 else f"{self.name}/head{head}"
        return Keys(self.moment.seed, self.moment.update, name)


def _scores_of_links(scored: Scored) -> tuple[Tensor, Tensor]:
    """Flat indices of the links and their scores."""
    links = scored.mask_OI.flatten().nonzero().squeeze(1)
    scores = scored.score_OI.flatten()[links]
    scored.check_range(scores)
    return links, scores


def _mask_of(links: Tensor, like: Tensor) -> Tensor:
    mask = like.new_zeros(like.numel())
    mask[links] = True
    return mask.view_as(like)


def _shares(total: int, counts: Sequence[int]) -> list[int]:
    """``total`` cut in proportion to ``counts``, which are their own shares of their sum; largest remainders first."""
    whole = sum(counts)
    assert whole > 0, counts
    shares = [total * count // whole for count in counts]
    order = sorted(range(len(counts)), key=lambda i: (-(total * counts[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _change(before: Tensor, stages: Sequence[Tensor]) -> LayerChange:
    """From the mask before the update, after decay, after removal, after percolation, after regrowth."""
    decayed, _, passing, grown = stages
    counts = [int(mask.count_nonzero()) for mask in stages]
    return LayerChange(
        mask=grown,
        pruned=int((before & ~decayed).count_nonzero()),
        removed=counts[0] - counts[1],
        percolated=counts[1] - counts[2],
        regrown=int((decayed & ~before).count_nonzero()) + counts[3] - counts[2],
        returned=int((decayed & ~passing & grown).count_nonzero()),
    )


def _heads(method: Method, group: Group, name: str) -> int:
    """Blocks of rows that the layer is evolved in: heads of query, key and value where the settings ask for it."""
    return group.heads.get(name, 1) if method.settings.per_head else 1


def _units(group: Group, settings: Any) -> Group:
    """The group with rotary units taken by position, and with whole heads, where the settings ask for it."""
    units = group.units
    if settings.qk_pairing == "position":
        units = tuple(replace(u, pairing="position") if isinstance(u, QueryKey) else u for u in units)
    if settings.dead_heads:
        units = with_dead_heads(units)
    return replace(group, units=units)


def _biased(method: Method, has_bias: frozenset[str]) -> frozenset[str]:
    return has_bias if method.settings.percolate_bias == "exact" else frozenset()
