"""A method resolved against the length of a run: when updates happen, by which rules, towards how many links.

``resolve`` fills a preset and its overrides into one frozen ``Method`` and refuses what cannot work or contradicts
itself, before anything is built. The update itself is in ``update.py``. Rejected: a class per method, which would make
a mix of two methods a third class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from llm_cht.errors import UserError
from llm_cht.topology import link, score
from llm_cht.topology.budget import budget_links
from llm_cht.topology.checks import check_dense, check_ranges, check_together, refuse
from llm_cht.topology.presets import PRESETS, preset
from llm_cht.topology.schedule import Anneal, AnyDensity, Density, Stages, StepTable, Temperature, Updates, check_name
from llm_cht.topology.schedule import density_window as _window
from llm_cht.topology.settings import MethodSettings


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
        removes = self.due(step) and self.evolves(step) and self.settings.removal in score.NEEDS_GRADIENT
        return removes or self.regrows_by_gradient(step)

    def regrows_by_gradient(self, step: int) -> bool:
        """Whether the update of ``step`` compares missing links by their gradient, which costs more than links do."""
        return self.due(step) and self.evolves(step) and self.regrowth(step) in link.NEEDS_GRADIENT

    def needs_momentum(self, step: int) -> bool:
        """Whether the dense gradient of ``step`` enters an average that an update from then on looks at."""
        return step <= self._last_momentum

    @cached_property
    def _last_momentum(self) -> int:
        due = range(self.updates.interval, self.updates.end_step + 1, self.updates.interval)
        return max((s for s in due if self.evolves(s) and self.regrowth(s) in link.NEEDS_MOMENTUM), default=0)

    def targets(
        self, shapes: Mapping[str, tuple[int, int]], step: int, present: Mapping[str, int] | None = None
    ) -> dict[str, Target]:
        """Links of all layers at the update of ``step``; step 0 gives those of the start.

        ``present``: links that the layers have, or those of the file they start from; for the budget 'kept'.
        """
        budget = self.settings.budget
        if budget == "kept":
            assert present is not None
            return {name: Target(present[name]) for name in shapes}
        links = budget_links(shapes, self.density(step), budget)
        floor = self.density.kept_by_removal(step)
        if floor is None:
            return {name: Target(count) for name, count in links.items()}
        kept = budget_links(shapes, floor, budget)
        return {name: Target(count, kept[name]) for name, count in links.items()}


def resolve(settings: MethodSettings, total_steps: int, task: str = "language_modelling") -> Method:
    """The method that ``settings`` ask for in a run of ``total_steps`` optimizer steps, of a task of ``TASKS``.

    Raises:
        UserError: a fraction outside its range, an interval below 1, an end beyond the run, settings that contradict
            each other.
    """
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) is not None}
    check_name("preset", settings.preset, PRESETS)
    full: Any = MethodSettings(**(preset(settings.preset, task) | given))
    if settings.preset == "dense":
        check_dense(full)
        full = replace(full, sparsity=0.0)
    check_ranges(full, total_steps)
    check_together(full)
    end_step = int(0.75 * total_steps) if full.end_step is None else full.end_step
    density_end = end_step if full.density_end_step is None else full.density_end_step
    evolves = full.zeta > 0 or full.density == "em_s"
    if evolves and end_step < full.update_interval and full.end_step != 0:
        raise UserError(
            f"`method.update_interval` = {full.update_interval}: no topology update falls into the steps up to "
            f"`method.end_step` = {end_step} of a run of {total_steps}; lower it, train longer, or set "
            "`method.end_step: 0`"
        )
    density = _density(full, density_end)
    full = replace(full, end_step=end_step, density_end_step=density_end, sparsity=round(1 - density.final, 12))
    last_regrowth = end_step // full.update_interval * full.update_interval
    for step in full.regrowth_from:
        if evolves and step > last_regrowth:
            refuse(full, "regrowth_from", f"the last regrowth is at step {last_regrowth}; lower {step}")
    if density.last_step > total_steps:
        refuse(full, "density_table", f"step {density.last_step} lies beyond the run of {total_steps} steps; lower it")
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
