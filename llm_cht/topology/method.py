"""Methods as data, and the one topology update that all of them run.

A preset is a row of settings over the functions of this package; there is no branch on a method's name. The update is
pure: weights, masks, a step and a seed in, new masks and counts out. What follows from a new mask (weights, moments,
history) is done by ``llm_cht.evolve``.

Order of an update (papers 000 and 002): density decay, removal, percolation, regrowth to the scheduled count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology.budget import num_links
from llm_cht.topology.initial import STARTS, Given, InitialOptions, repair
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import NEEDS_GRADIENT, PREDICTORS
from llm_cht.topology.percolate import Group, QueryKey, percolate
from llm_cht.topology.schedule import Anneal, Density, Temperature, Updates, density_window
from llm_cht.topology.score import SCORES, Scored
from llm_cht.topology.select import choose, choose_missing


@dataclass
class MethodSettings:
    """How the topology starts and evolves; null means: as the preset says."""

    preset: Literal["dense", "static", "set", "rigl", "chts", "chtss"] = "chts"
    """Row of defaults for every setting below; dense has no topology, and refuses settings of one."""
    sparsity: float = 0.9
    """Fraction of missing links at the end, in [0, 1)."""
    update_interval: int = 100
    """Optimizer steps between topology updates."""
    end_step: int | None = None
    """Last step with removal and regrowth; null: 0.75 of the run."""
    initial: Literal["er", "brf"] | None = None
    """First links: er (uniform) or brf (receptive fields, 002 App. D)."""
    brf_r: float | None = None
    """Spatial randomness of brf, 0 (nearest inputs) to 1 (uniform)."""
    brf_degree: Literal["fixed", "uniform"] | None = None
    """Degrees of the output neurons under brf."""
    repair: bool | None = None
    """Move one link to every neuron that starts without any."""
    removal: Literal["magnitude", "relative_importance"] | None = None
    """Score by which links are kept."""
    removal_choice: Literal["hard", "soft"] | None = None
    """hard: the best stay; soft: sampled by score ** temperature."""
    temperature_start: float | None = None
    """Exponent of soft removal at step 0."""
    temperature_end: float | None = None
    """Exponent of soft removal at end_step."""
    interpolate: Literal["temperature", "delta"] | None = None
    """What runs linearly from start to end: T, or delta with T = delta / (1 - delta)."""
    zeta: float | None = None
    """Fraction of a layer's links removed at one update, in [0, 1)."""
    zeta_schedule: Literal["constant", "cosine"] | None = None
    """cosine: falls to 0 at end_step."""
    regrowth: Literal["random", "gradient", "ch2_l3n"] | None = None
    """Link predictor."""
    regrowth_choice: Literal["hard", "soft"] | None = None
    """hard: the best missing links; soft: sampled."""
    regrowth_delta: float | None = None
    """Soft regrowth samples by score ** (delta / (1 - delta)), in [0, 1)."""
    density: Literal["constant", "sigmoid"] | None = None
    """Density over time; sigmoid falls from 1 - start_sparsity to 1 - sparsity."""
    start_sparsity: float | None = None
    """Sparsity at the start of a decaying density."""
    density_end_step: int | None = None
    """End of the density window; null: end_step."""
    half_window: bool | None = None
    """Halve the density window, so that sigmoid and cubic decay cost equal FLOPs (002 App. I)."""
    pruning: Literal["magnitude", "relative_importance"] | None = None
    """Score of the links that density decay keeps."""
    percolate: bool | None = None
    """Remove links that cannot carry signal."""
    percolate_bias: Literal["exact", "paper"] | None = None
    """exact: a row with a bias is not empty; paper: biases are ignored."""
    qk_pairing: Literal["rotary", "position"] | None = None
    """Percolation unit of query and key: the model's rotary pair, or row by row as in 002 App. F (changes logits)."""
    new_weight: Literal["zero", "history"] | None = None
    """First weight of a link that did not exist before the update."""
    workspace_mb: int = 256
    """Bound on the temporaries of a link score, in MiB."""


_STILL: dict[str, Any] = {
    "initial": "er",
    "brf_r": 0.2,
    "brf_degree": "fixed",
    "repair": False,
    "removal": "magnitude",
    "removal_choice": "hard",
    "temperature_start": 1.0,
    "temperature_end": 9.0,
    "interpolate": "temperature",
    "zeta": 0.0,
    "zeta_schedule": "constant",
    "regrowth": "random",
    "regrowth_choice": "hard",
    "regrowth_delta": 0.5,
    "density": "constant",
    "start_sparsity": 0.5,
    "half_window": False,
    "pruning": "relative_importance",
    "percolate": False,
    "percolate_bias": "exact",
    "qk_pairing": "rotary",
    "new_weight": "zero",
}
_SET = _STILL | {"zeta": 0.1}
_CHTS = _SET | {
    "initial": "brf",
    "removal_choice": "soft",
    "regrowth": "ch2_l3n",
    "regrowth_choice": "soft",
    "percolate": True,
    "new_weight": "history",
}
PRESETS: dict[str, dict[str, Any]] = {
    "dense": _STILL,
    "static": _STILL,
    "set": _SET,
    "rigl": _SET | {"regrowth": "gradient", "zeta_schedule": "cosine"},
    "chts": _CHTS,
    "chtss": _CHTS | {"density": "sigmoid", "half_window": True},
}


_SAYS_ONLY_WHEN = {"update_interval", "end_step", "density_end_step", "workspace_mb"}
"""settings that a config for several presets may hold under dense too"""


@dataclass(frozen=True)
class Method:
    """A preset with its overrides, resolved against the length of a run."""

    settings: Any
    """a ``MethodSettings`` without any None; Any, since its fields are typed as optional"""
    updates: Updates
    """up to ``settings.end_step``, or to the end of a density window that outlasts it and goes on pruning"""
    zeta: Anneal
    temperature: Temperature
    density: Density

    def due(self, step: int) -> bool:
        """Whether a topology update follows optimizer step ``step``."""
        return self.updates.due(step)

    @property
    def evolves(self) -> bool:
        """Whether links are removed and regrown."""
        return self.settings.zeta > 0

    @property
    def needs_gradient(self) -> bool:
        """Whether an update looks at the dense gradient of the step before it."""
        return self.evolves and self.settings.regrowth in NEEDS_GRADIENT

    def start(self, shape: tuple[int, int], keys: Keys) -> Tensor:
        """First mask (out, in) with exactly the scheduled number of links."""
        options = InitialOptions(self.settings.brf_r, self.settings.brf_degree)
        mask = STARTS[self.settings.initial](shape, num_links(shape, self.density(0)), keys, options, Given())
        return repair(mask, keys) if self.settings.repair else mask


def resolve(settings: MethodSettings, total_steps: int) -> Method:
    """The method that ``settings`` ask for in a run of ``total_steps`` optimizer steps.

    Raises:
        UserError: a fraction outside its range, an interval below 1, an end beyond the run.
    """
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) is not None}
    full: Any = MethodSettings(**(PRESETS[settings.preset] | given))
    if settings.preset == "dense":
        _check_dense(full)
        full = replace(full, sparsity=0.0)
    _check(full, total_steps)
    end_step = int(0.75 * total_steps) if full.end_step is None else full.end_step
    density_end = end_step if full.density_end_step is None else full.density_end_step
    if full.zeta > 0 and full.end_step is None and end_step < full.update_interval:
        raise UserError(
            f"`method.update_interval` = {full.update_interval}: no topology update falls into a run of {total_steps} "
            f"steps, whose updates end at step {end_step}; lower it, train longer, or set `method.end_step: 0`"
        )
    full = replace(full, end_step=end_step, density_end_step=density_end)
    start, end = density_window(0, density_end, full.update_interval, full.half_window)
    final, first = (round(1 - sparsity, 12) for sparsity in (full.sparsity, full.start_sparsity))  # 1 - 0.9 is 0.1
    decays = full.density != "constant"
    last_update = max(end_step if full.zeta > 0 else 0, end if decays else 0)
    return Method(
        settings=full,
        updates=Updates(full.update_interval, last_update),
        zeta=Anneal(full.zeta, end_step, full.zeta_schedule),
        temperature=Temperature(full.temperature_start, full.temperature_end, end_step, full.interpolate),
        density=Density(full.density, first if decays else final, final, start, end),
    )


def _check_dense(full: Any) -> None:
    """Refuse what would be silently without effect; a default, or what a dense run resolves it to, says nothing."""
    untouched = MethodSettings(preset="dense", **PRESETS["dense"])
    odd = {f.name: getattr(full, f.name) for f in fields(full) if f.name not in _SAYS_ONLY_WHEN}
    odd = {key: value for key, value in odd.items() if value != getattr(untouched, key)}
    if odd.get("sparsity") == 0:
        del odd["sparsity"]
    if odd:
        named = ", ".join(f"`method.{key}` = {value!r}" for key, value in odd.items())
        raise UserError(f"{named}: the preset dense has no topology; leave it out, or choose another `method.preset`")


def _check(settings: Any, total_steps: int) -> None:
    def refuse(key: str, rule: str) -> None:
        raise UserError(f"`method.{key}` = {getattr(settings, key)}: {rule}")

    for key in ("sparsity", "start_sparsity", "zeta", "regrowth_delta"):
        if not 0 <= getattr(settings, key) < 1:
            refuse(key, "must be a fraction in [0, 1)")
    if not 0 <= settings.brf_r <= 1:
        refuse("brf_r", "must lie in [0, 1]")
    if settings.update_interval < 1:
        refuse("update_interval", "must be at least 1 optimizer step")
    for key in ("end_step", "density_end_step"):
        value = getattr(settings, key)
        if value is not None and not 0 <= value <= total_steps:
            refuse(key, f"must lie in the run of {total_steps} steps (0 to {total_steps}); null chooses it")
    if settings.density != "constant" and settings.start_sparsity > settings.sparsity:
        refuse("start_sparsity", f"is above the final `method.sparsity` = {settings.sparsity}; density only decays")
    if settings.workspace_mb < 1:
        refuse("workspace_mb", "must be at least 1 MiB")


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
    returned: int
    """taken away by removal or percolation and regrown in the same update"""


@dataclass(frozen=True)
class Inputs:
    """What an update of a group looks at, by layer; nothing of it is changed."""

    weights: Mapping[str, Tensor]
    """fp32 (out, in), 0 off the mask"""
    masks: Mapping[str, Tensor]
    """bool (out, in)"""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 (out, in) of the dense weight; empty unless the method ``needs_gradient``"""


def update_group(
    method: Method,
    group: Group,
    inputs: Inputs,
    has_bias: frozenset[str],
    moment: Moment,
) -> dict[str, LayerChange]:
    """One topology update of the layers of ``group``.

    Args:
        method: what to do.
        group: the layers' names and percolation units.
        inputs: weights, masks and gradients of the layers.
        has_bias: layers with a bias.
        moment: step, number of the update and seed of the run.

    Returns:
        The new mask of each layer, which has exactly the scheduled number of links, and the counts.
    """
    settings, weights, masks = method.settings, inputs.weights, inputs.masks
    evolving = method.evolves and moment.step <= settings.end_step
    layers = {name: Keys(moment.seed, moment.update, name) for name in group.layers}
    targets = {name: num_links(masks[name].shape, method.density(moment.step)) for name in layers}
    decayed = {name: _decay(method, weights[name], masks[name], targets[name], keys) for name, keys in layers.items()}
    if not evolving:
        return {name: _change(masks[name], decayed[name]) for name in layers}
    kept = {name: _remove(method, weights[name], decayed[name], keys, moment) for name, keys in layers.items()}
    passing = kept
    if settings.percolate:
        passing = percolate(_paired(group, settings), kept, _biased(settings, has_bias))[0]
    changes = {}
    for name, keys in layers.items():
        grown = _regrow(method, passing[name], inputs.gradients.get(name), targets[name], keys)
        changes[name] = _change(masks[name], decayed[name], kept[name], passing[name], grown)
    return changes


def active_neurons(
    method: Method, group: Group, masks: Mapping[str, Tensor], has_bias: frozenset[str]
) -> tuple[int, int]:
    """Active and all neurons of the group's units after a trial percolation (002's ANP is their ratio)."""
    _, active, total = percolate(_paired(group, method.settings), masks, _biased(method.settings, has_bias))
    return active, total


def _decay(method: Method, weight: Tensor, mask: Tensor, target: int, keys: Keys) -> Tensor:
    if int(mask.count_nonzero()) <= target:
        return mask
    rule = method.settings.pruning
    scored = Scored(f"`method.pruning` = {rule}", keys.layer, SCORES[rule](weight, mask, None), mask)
    return _keep(scored, lambda of_links, index: choose(of_links, target, None, keys, "prune", index))


def _remove(method: Method, weight: Tensor, mask: Tensor, keys: Keys, moment: Moment) -> Tensor:
    settings = method.settings
    links = int(mask.count_nonzero())
    keep = links - math.floor(method.zeta(moment.step) * links)
    exponent = method.temperature(moment.step) if settings.removal_choice == "soft" else None
    rule = settings.removal
    scored = Scored(f"`method.removal` = {rule}", keys.layer, SCORES[rule](weight, mask, None), mask)
    return _keep(scored, lambda of_links, index: choose(of_links, keep, exponent, keys, "remove", index))


def _keep(scored: Scored, choice: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mask of those links that ``choice`` takes, given the links' scores and flat indices."""
    links = scored.mask_OI.flatten().nonzero().squeeze(1)
    scores = scored.score_OI.flatten()[links]
    scored.check_range(scores)
    kept = scored.mask_OI.new_zeros(scored.mask_OI.numel())
    kept[links[choice(scores, links)]] = True
    return kept.view_as(scored.mask_OI)


def _regrow(method: Method, mask: Tensor, gradient: Tensor | None, target: int, keys: Keys) -> Tensor:
    settings = method.settings
    delta = settings.regrowth_delta
    exponent = delta / (1 - delta) if settings.regrowth_choice == "soft" else None
    missing = target - int(mask.count_nonzero())
    if missing == 0:
        return mask
    score = PREDICTORS[settings.regrowth](mask, gradient, settings.workspace_mb)
    scored = Scored(f"`method.regrowth` = {settings.regrowth}", keys.layer, score, mask)
    scored.check_range(score)
    scored.check_zero_on_links()
    grown = mask.clone()
    grown.view(-1)[choose_missing(score, mask, missing, exponent, keys)] = True
    return grown


def _change(
    before: Tensor,
    decayed: Tensor,
    kept: Tensor | None = None,
    passing: Tensor | None = None,
    grown: Tensor | None = None,
) -> LayerChange:
    if kept is None or passing is None or grown is None:
        return LayerChange(decayed, int(before.count_nonzero()) - int(decayed.count_nonzero()), 0, 0, 0, 0)
    counts = [int(mask.count_nonzero()) for mask in (before, decayed, kept, passing, grown)]
    returned = int((decayed & ~passing & grown).count_nonzero())
    pruned, removed, percolated, lost = (a - b for a, b in itertools.pairwise(counts))
    return LayerChange(grown, pruned, removed, percolated, -lost, returned)


def _paired(group: Group, settings: Any) -> Group:
    """The group with rotary units taken by position where the settings ask for it."""
    if settings.qk_pairing != "position":
        return group
    units = tuple(replace(u, pairing="position") if isinstance(u, QueryKey) else u for u in group.units)
    return replace(group, units=units)


def _biased(settings: Any, has_bias: frozenset[str]) -> frozenset[str]:
    return has_bias if settings.percolate_bias == "exact" else frozenset()
