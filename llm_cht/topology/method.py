"""A method resolved against the length of a run: when updates happen, by which rules, towards how many links.

``resolve`` fills a preset and its overrides into one frozen ``Method`` and refuses what cannot work or contradicts
itself, before anything is built. The update itself is in ``update.py``. Rejected: a class per method, which would make
a mix of two methods a third class.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llm_cht.errors import UserError
from llm_cht.topology import link, score
from llm_cht.topology.budget import budget_links
from llm_cht.topology.initial import STARTS
from llm_cht.topology.presets import PRESETS
from llm_cht.topology.schedule import SHAPES, Anneal, AnyDensity, Density, Stages, StepTable, Temperature, Updates
from llm_cht.topology.schedule import density_window as _window
from llm_cht.topology.settings import MethodSettings
from llm_cht.topology.weights import WEIGHTS

_SAYS_ONLY_WHEN = {
    *("update_interval", "end_step", "density_end_step", "workspace_mb", "calibration_sequences", "force")
}
"""settings that a config for several presets may hold under dense too"""


@dataclass(frozen=True)
class Target:
    """Links of a layer at an update."""

    links: int
    """after it"""
    kept: int | None = None
    """that removal leaves; None: zeta says how many it takes"""


@dataclass(frozen=True)
class Method:
    """A preset with its overrides, resolved against the length of a run."""

    settings: Any
    """a ``MethodSettings`` without any None; Any, since its fields are typed as optional"""
    updates: Updates
    """up to ``settings.end_step``, or to the end of a density window that outlasts it and goes on pruning"""
    zeta: Anneal
    temperature: Temperature
    density: AnyDensity

    def due(self, step: int) -> bool:
        """Whether a topology update follows optimizer step ``step``."""
        return self.updates.due(step)

    def evolves(self, step: int = 0) -> bool:
        """Whether the update of ``step`` removes and regrows links; by default: whether any does."""
        removes = self.settings.zeta > 0 or self.density.kept_by_removal(step) is not None
        return removes and step <= self.settings.end_step

    def regrowth(self, step: int) -> str:
        """Name of the link predictor in force at ``step``."""
        later = {start: rule for start, rule in self.settings.regrowth_from.items() if start <= step}
        return str(later[max(later)] if later else self.settings.regrowth)

    @property
    def rules(self) -> set[str]:
        """Every link predictor of the run."""
        return {self.settings.regrowth, *self.settings.regrowth_from.values()} if self.evolves() else set()

    def needs_gradient(self, step: int) -> bool:
        """Whether the update of ``step`` looks at the dense gradient of the optimizer step before it."""
        if not (self.due(step) and self.evolves(step)):
            return False
        return self.regrowth(step) in link.NEEDS_GRADIENT or self.settings.removal in score.NEEDS_GRADIENT

    def needs_momentum(self, step: int) -> bool:
        """Whether the dense gradient of ``step`` enters an average that a later update looks at."""
        return bool(self.rules & link.NEEDS_MOMENTUM) and step <= self.updates.last_due

    def targets(self, shapes: Mapping[str, tuple[int, int]], step: int) -> dict[str, Target]:
        """Links of all layers at the update of ``step``; step 0 gives those of the start."""
        budget = self.settings.budget
        links = budget_links(shapes, self.density(step), budget)
        floor = self.density.kept_by_removal(step)
        if floor is None:
            return {name: Target(count) for name, count in links.items()}
        kept = budget_links(shapes, floor, budget)
        return {name: Target(count, kept[name]) for name, count in links.items()}


def resolve(settings: MethodSettings, total_steps: int) -> Method:
    """The method that ``settings`` ask for in a run of ``total_steps`` optimizer steps.

    Raises:
        UserError: a fraction outside its range, an interval below 1, an end beyond the run, settings that contradict
            each other.
    """
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) is not None}
    _check_name("preset", settings.preset, PRESETS)
    full: Any = MethodSettings(**(PRESETS[settings.preset] | given))
    if settings.preset == "dense":
        _check_dense(full)
        full = replace(full, sparsity=0.0)
    _check(full, total_steps)
    _check_together(full)
    end_step = int(0.75 * total_steps) if full.end_step is None else full.end_step
    density_end = end_step if full.density_end_step is None else full.density_end_step
    evolves = full.zeta > 0 or full.density == "em_s"
    if evolves and full.end_step is None and end_step < full.update_interval:
        raise UserError(
            f"`method.update_interval` = {full.update_interval}: no topology update falls into a run of {total_steps} "
            f"steps, whose updates end at step {end_step}; lower it, train longer, or set `method.end_step: 0`"
        )
    density = _density(full, density_end)
    full = replace(full, end_step=end_step, density_end_step=density_end, sparsity=round(1 - density.final, 12))
    late = [step for step in (*full.regrowth_from, density.last_step) if step > total_steps]
    if late:
        raise UserError(
            f"`method`: step {late[0]} of `regrowth_from` or `density_table` lies beyond the run of {total_steps} steps"
        )
    return Method(
        settings=full,
        updates=Updates(full.update_interval, max(end_step if evolves else 0, density.last_step)),
        zeta=Anneal(full.zeta, end_step, full.zeta_schedule),
        temperature=Temperature(full.temperature_start, full.temperature_end, end_step, full.interpolate),
        density=density,
    )


def _density(full: Any, density_end: int) -> AnyDensity:
    final, first = (round(1 - sparsity, 12) for sparsity in (full.sparsity, full.start_sparsity))  # 1 - 0.9 is 0.1
    start, end = _window(full.density_start_step, density_end, full.update_interval, full.half_window)
    if full.density == "table":
        steps = sorted((step, round(1 - sparsity, 12)) for step, sparsity in full.density_table.items())
        return StepTable(tuple(steps), full.update_interval)
    if full.density == "em_s":
        return Stages(final, start, end, full.update_interval)
    return Density(full.density, final if full.density == "constant" else first, final, start, end)


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


def _refuse(settings: Any, key: str, rule: str) -> None:
    raise UserError(f"`method.{key}` = {getattr(settings, key)}: {rule}")


def _check_name(key: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
        raise UserError(f"`method.{key}` = {name}: unknown; {hint}")


def _check(settings: Any, total_steps: int) -> None:
    """Refuse unknown names and values outside their own range."""
    tables: dict[str, Iterable[str]] = {
        "initial": STARTS,
        "initial_weight": WEIGHTS,
        "removal": score.SCORES,
        "regrowth": link.PREDICTORS,
        "density": (*SHAPES, "em_s", "table"),
        "pruning": [name for name in score.SCORES if name not in score.NEEDS_GRADIENT],
    }
    for key, known in tables.items():
        _check_name(key, getattr(settings, key), known)
    for rule in settings.regrowth_from.values():
        _check_name("regrowth_from", rule, link.PREDICTORS)
    for key in ("sparsity", "start_sparsity", "zeta", "regrowth_delta", "momentum_beta"):
        if not 0 <= getattr(settings, key) < 1:
            _refuse(settings, key, "must be a fraction in [0, 1)")
    for key in ("brf_r", "bsw_beta", "removal_alpha", "early_stop"):
        if not 0 <= getattr(settings, key) <= 1:
            _refuse(settings, key, "must lie in [0, 1]")
    for key, unit in (("update_interval", "optimizer step"), ("workspace_mb", "MiB"), ("calibration_sequences", "")):
        if getattr(settings, key) < 1:
            _refuse(settings, key, f"must be at least 1 {unit}".rstrip())
    for key in ("end_step", "density_start_step", "density_end_step"):
        value = getattr(settings, key)
        if value is not None and not 0 <= value <= total_steps:
            _refuse(settings, key, f"must lie in the run of {total_steps} steps (0 to {total_steps}); null chooses it")
    if not 0 < settings.initial_gain < math.inf:
        _refuse(settings, "initial_gain", "must be above 0 and finite")
    for step in settings.regrowth_from:
        if step < 1:
            _refuse(settings, "regrowth_from", "its steps must be at least 1; `method.regrowth` is the first rule")


def _check_together(settings: Any) -> None:
    """Refuse settings that contradict each other, or of which one would be without effect."""
    s = settings
    if s.density not in ("constant", "table", "em_s") and s.start_sparsity > s.sparsity:
        _refuse(s, "start_sparsity", f"is above the final `method.sparsity` = {s.sparsity}; density only decays")
    if s.density == "em_s":
        if s.zeta > 0 or s.zeta_schedule != "constant":
            key = "zeta" if s.zeta > 0 else "zeta_schedule"
            _refuse(s, key, "`method.density: em_s` itself says how many links go; set `method.zeta: 0`, constant")
        if s.early_stop > 0:
            _refuse(s, "early_stop", "a layer that stops could not shrink under `method.density: em_s`; set 0")
        if s.density_end_step not in (None, s.end_step):
            _refuse(
                s, "density_end_step", "under `method.density: em_s` the window ends at `method.end_step`; set that"
            )
    if bool(s.density_table) != (s.density == "table"):
        _refuse(s, "density_table", "goes together with `method.density: table`; give both or none")
    if s.removal_choice == "soft" and s.removal in score.HARD_ONLY:
        _refuse(s, "removal", "ranks links, which cannot be sampled by; set `method.removal_choice: hard`")
    if s.ties == "subrank" and (
        s.regrowth_choice == "soft" or not {s.regrowth, *s.regrowth_from.values()} <= link.PATHS
    ):
        _refuse(s, "ties", f"needs `method.regrowth_choice: hard` and link predictors among {sorted(link.PATHS)}")
    if s.density in ("constant", "em_s") and (s.pruning_memory or s.pruning_scope == "global"):
        key = "pruning_memory" if s.pruning_memory else "pruning_scope"
        _refuse(s, key, f"nothing is pruned under `method.density: {s.density}`; choose another density")
    if s.pruning_memory and s.new_weight != "history":
        _refuse(s, "new_weight", "links come back with remembered weights (`method.pruning_memory`); set history")
    if (s.initial == "file") != (s.initial_path is not None):
        _refuse(s, "initial_path", "goes together with `method.initial: file`; give both or none")
    if s.dead_heads and not s.percolate:
        _refuse(s, "dead_heads", "is a part of percolation; set `method.percolate: true`")
