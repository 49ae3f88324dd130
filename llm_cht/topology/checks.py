"""What is refused of a method's settings before anything is built: unknown names, ranges, contradictions; and what is
merely without effect, which is said and not refused, because a config may serve several presets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn

from llm_cht.errors import UserError
from llm_cht.topology import link, score
from llm_cht.topology.initial import STARTS
from llm_cht.topology.presets import PRESETS, TASKS, preset
from llm_cht.topology.schedule import SHAPES, check_name
from llm_cht.topology.settings import MethodSettings
from llm_cht.topology.weights import WEIGHTS

_SAYS_ONLY_WHEN = {
    *("update_interval", "end_step", "density_end_step", "workspace_mb", "calibration_sequences", "force")
}
"""settings that a config for several presets may hold under dense too"""

_SPARSITY = MethodSettings().sparsity


def check_dense(full: Any) -> None:
    """Refuse what would be silently without effect; a default, or what a dense run resolves it to, says nothing."""
    untouched = MethodSettings(preset="dense", **PRESETS["dense"])
    odd = {f.name: getattr(full, f.name) for f in fields(full) if f.name not in _SAYS_ONLY_WHEN}
    odd = {key: value for key, value in odd.items() if value != getattr(untouched, key)}
    if odd.get("sparsity") == 0:
        del odd["sparsity"]
    if odd:
        named = ", ".join(f"`method.{key}` = {value!r}" for key, value in odd.items())
        raise UserError(f"{named}: the preset dense has no topology; leave it out, or choose another `method.preset`")


def refuse(settings: Any, key: str, rule: str) -> NoReturn:
    """Raise ``UserError`` on one setting."""
    raise UserError(f"`method.{key}` = {getattr(settings, key)}: {rule}")


def check_ranges(settings: Any, total_steps: int) -> None:
    """Refuse unknown names and values outside their own range."""
    tables: dict[str, Iterable[str]] = {
        "initial": STARTS,
        "initial_weight": WEIGHTS,
        "removal": score.SCORES,
        "regrowth": link.PREDICTORS,
        "density": (*SHAPES, "em_s", "table"),
        "pruning": [name for name in score.SCORES if name not in score.NEEDS_GRADIENT and name != "general"],
    }
    for key, known in tables.items():
        check_name(key, getattr(settings, key), known)
    for rule in settings.regrowth_from.values():
        check_name("regrowth_from", rule, link.PREDICTORS)
    for key in ("sparsity", "start_sparsity", "zeta", "regrowth_delta", "momentum_beta"):
        if not 0 <= getattr(settings, key) < 1:
            refuse(settings, key, "must be a fraction in [0, 1), as 0.9 for 90 %")
    for key in ("brf_r", "bsw_beta", "removal_alpha", "early_stop"):
        if not 0 <= getattr(settings, key) <= 1:
            refuse(settings, key, "must lie in [0, 1]")
    for key, unit in (("update_interval", "optimizer step"), ("workspace_mb", "MiB"), ("calibration_sequences", "")):
        if getattr(settings, key) < 1:
            refuse(settings, key, f"must be at least 1 {unit}".rstrip())
    for key in ("end_step", "density_start_step", "density_end_step"):
        value = getattr(settings, key)
        if value is not None and not 0 <= value <= total_steps:
            refuse(settings, key, f"must lie in the run of {total_steps} steps (0 to {total_steps}); null chooses it")
    if not 0 < settings.initial_gain < math.inf:
        refuse(settings, "initial_gain", "must be above 0 and finite")
    for step in settings.regrowth_from:
        if step < 1:
            refuse(settings, "regrowth_from", "its steps must be at least 1; `method.regrowth` is the first rule")


def check_together(s: Any) -> None:
    """Refuse settings that contradict each other."""
    for contradicts, key, remedy in (*_of_density(s), *_of_rules(s)):
        if contradicts:
            refuse(s, key, remedy)


def _of_density(s: Any) -> tuple[tuple[bool, str, str], ...]:
    """(whether it contradicts, setting, remedy)."""
    staged = s.density == "em_s"
    across = "pruning_memory" if s.pruning_memory else "pruning_scope"
    decays = s.density in SHAPES and s.density != "constant"
    return (
        (
            decays and s.start_sparsity > s.sparsity,
            "start_sparsity",
            f"is above the final `method.sparsity` = {s.sparsity}, but density only decays; lower "
            "`method.start_sparsity`, or set `method.density: constant`",
        ),
        (staged and s.zeta > 0, "zeta", "`method.density: em_s` itself says how many links go; set 0"),
        (
            staged and s.zeta_schedule != "constant",
            "zeta_schedule",
            "`method.density: em_s` itself says how many links go; set constant",
        ),
        (staged and s.early_stop > 0, "early_stop", "a layer that stops could not shrink under em_s; set 0"),
        (
            staged and s.density_end_step not in (None, s.end_step),
            "density_end_step",
            "the window of `method.density: em_s` ends at `method.end_step`; set that",
        ),
        (staged and s.half_window, "half_window", "em_s needs the window up to `method.end_step`; set false"),
        (
            bool(s.density_table) != (s.density == "table"),
            "density_table",
            "goes together with `method.density: table`; give both or none",
        ),
        (
            s.density == "table" and s.density_table and s.sparsity not in (_SPARSITY, _last(s.density_table)),
            "sparsity",
            f"`method.density_table` ends at {_last(s.density_table)}; leave `method.sparsity` out",
        ),
        (
            (s.pruning_memory or s.pruning_scope == "global") and not (decays or s.density == "table"),
            across,
            f"nothing is pruned under `method.density: {s.density}`; choose another density",
        ),
        (
            s.pruning_memory and s.new_weight != "history",
            "new_weight",
            "links come back with remembered weights (`method.pruning_memory`); set history",
        ),
    )


def _of_rules(s: Any) -> tuple[tuple[bool, str, str], ...]:
    """As ``_of_density``."""
    still = not (s.zeta > 0 or s.density == "em_s")
    rules = {s.regrowth, *s.regrowth_from.values()}
    return (
        (
            s.removal_choice == "soft" and s.removal in score.HARD_ONLY,
            "removal",
            "ranks links, which cannot be sampled by; set `method.removal_choice: hard`",
        ),
        (
            s.ties == "subrank" and (s.regrowth_choice == "soft" or not rules <= link.LINK_SCORES.keys()),
            "ties",
            f"needs `method.regrowth_choice: hard` and link predictors among {sorted(link.LINK_SCORES)}",
        ),
        (
            (s.initial == "file") != (s.initial_path is not None),
            "initial_path",
            "goes together with `method.initial: file`; give both (the path is RUN/model) or none",
        ),
        (
            s.budget == "kept" and not (s.initial == "file" and s.density == "constant"),
            "budget",
            "keeps the counts of `method.initial: file` at a constant density; set both, or another budget",
        ),
        (s.dead_heads and not s.percolate, "dead_heads", "is a part of percolation; set `method.percolate: true`"),
        (bool(s.regrowth_from) and still, "regrowth_from", "nothing is regrown at `method.zeta` = 0; raise that"),
    )


def without_effect(s: Any) -> list[str]:
    """Sentences on settings that differ from their preset and do nothing beside the others; ``s`` is resolved."""
    decays = s.density in SHAPES and s.density != "constant"
    evolves = s.zeta > 0 or s.density == "em_s"
    needed = {
        "brf_r": (s.initial == "brf", "initial: brf"),
        "brf_degree": (s.initial == "brf", "initial: brf"),
        "bsw_beta": (s.initial == "bsw", "initial: bsw"),
        "bsf_equal_partition": (s.initial == "bsf", "initial: bsf"),
        "bsf_resort": (s.initial == "bsf", "initial: bsf"),
        "csti_inner": (s.initial == "csti", "initial: csti"),
        "initial_gain": (s.initial_weight in ("swi", "kaiming"), "initial_weight: swi or kaiming"),
        "removal": (evolves, "zeta above 0"),
        "removal_choice": (evolves, "zeta above 0"),
        "removal_alpha": (evolves and s.removal == "general", "removal: general"),
        "temperature_start": (evolves and s.removal_choice == "soft", "removal_choice: soft"),
        "temperature_end": (evolves and s.removal_choice == "soft", "removal_choice: soft"),
        "interpolate": (evolves and s.removal_choice == "soft", "removal_choice: soft"),
        "zeta_schedule": (s.zeta > 0, "zeta above 0"),
        "regrowth": (evolves, "zeta above 0"),
        "regrowth_choice": (evolves, "zeta above 0"),
        "regrowth_delta": (evolves and s.regrowth_choice == "soft", "regrowth_choice: soft"),
        "momentum_beta": (evolves and "momentum" in {s.regrowth, *s.regrowth_from.values()}, "regrowth: momentum"),
        "start_sparsity": (decays, "a density that decays"),
        "density_start_step": (decays, "a density that decays"),
        "pruning": (decays or s.density == "table" or s.initial == "checkpoint", "a density that decays"),
        "percolate": (evolves, "zeta above 0"),
        "percolate_bias": (evolves and s.percolate, "percolate: true"),
        "qk_pairing": (evolves and s.percolate, "percolate: true"),
        "per_head": (evolves, "zeta above 0"),
        "early_stop": (evolves, "zeta above 0"),
    }
    own = [preset(s.preset, task) for task in TASKS]
    return [
        f"`method.{key}` = {getattr(s, key)} has no effect without `method.{condition}`"
        for key, (is_met, condition) in needed.items()
        if all(getattr(s, key) != row[key] for row in own) and not is_met
    ]


def _last(table: dict[int, float]) -> float | None:
    return table[max(table)] if table else None
