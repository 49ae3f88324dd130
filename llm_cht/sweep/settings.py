"""The sweep file: which settings differ between the runs, and the runs that follow from it, all checked.

A setting is one case (a named set of overrides) with one combination of the grid. A case that sets a key of the grid
itself is not varied over that key: so a dense model, which has no sparsity, is one run that every sparsity is compared
with. Paths in the file mean the same as on the command line of ``llm-cht train``: from the working directory.
Rejected: the typed parser of ``config``, which takes the dots in the names of overrides for sections of the sweep.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_cht import config
from llm_cht.errors import UserError, nearest
from llm_cht.files import absolute
from llm_cht.train.config import RunSettings, check, resolved

CASE = "case"
"""the factor whose values are the names of the cases"""

_KEYS = ("base", "settings", "folder", "cases", "grid", "seeds", "skip", "compare", "reference", "metric", "higher")
_OURS = {"run": "`folder`", "seed": "`seeds`", "resume": "nothing: a sweep resumes by itself"}
_MAX_NAME = 120


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    file: str
    base: list[str]
    """config files of every run"""
    settings: dict[str, Any]
    """overrides of every run by dotted name"""
    folder: Path
    """runs go to folder/NAME_seedK"""
    cases: dict[str, dict[str, Any]]
    """name -> overrides by dotted name"""
    grid: dict[str, list[Any]]
    """dotted name -> values"""
    seeds: list[int]
    skip: list[dict[str, Any]]
    """factors -> values: combinations that agree with one of these are left out"""
    compare: str | None
    """the factor whose values are compared"""
    reference: str | None
    """the value that the others are tested against, as text"""
    metric: str
    """key of a run's summary"""
    higher: bool
    """whether a higher metric is better"""


@dataclass(frozen=True)
class Setting:
    """One combination."""

    name: str
    factors: dict[str, str]
    """factor -> value as text; without the keys of the grid that the case sets itself"""
    overrides: dict[str, Any]
    """dotted name -> value, of the case and the grid"""


@dataclass(frozen=True)
class Run:
    """One run: a setting with a seed."""

    name: str
    setting: Setting
    settings: RunSettings
    """resolved"""

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.settings.run)


def text(value: Any) -> str:
    """A value of a setting as a table shows it, and by which two are the same."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def load_sweep(file: str) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: it is not there, or something in it cannot be, named with the remedy.
    """
    values = config.load_yaml(file)
    config.check_keys(values, dict.fromkeys(_KEYS, False), place=file)
    for key in ("settings", "cases", "grid", "seeds"):
        if key in values and not values[key]:
            raise UserError(f"`{key}` in {file} is empty; fill it in, or leave it out")
    base = values.get("base")
    base = [base] if isinstance(base, str) else base
    if not isinstance(base, list) or not base or not all(isinstance(name, str) for name in base):
        raise UserError(f"`base` = {base!r} in {file}: give the config file of every run, or a list of them")
    folder = values.get("folder")
    if not isinstance(folder, str) or not folder:
        raise UserError(f"`folder` = {folder!r} in {file}: give the folder that the runs go to")
    cases, grid = _cases(values.get("cases", {}), file), _grid(values.get("grid", {}), file)
    if not cases and not grid:
        raise UserError(f"{file} varies nothing: give `grid:` (settings and their values) or `cases:` (named settings)")
    factors = ([CASE] if cases else []) + list(grid)
    compare = values.get("compare", factors[0] if len(factors) == 1 or cases else None)
    if compare is not None and compare not in factors:
        raise UserError(f"`compare` = {compare!r} in {file} is not varied; {nearest(str(compare), factors)}")
    if "reference" in values and compare is None:
        raise UserError(f"`reference` in {file} needs `compare`: name the factor that it is a value of")
    settings = _checked(values.get("settings", {}), f"{file}, `settings`")
    for key in settings:
        if key in grid:
            raise UserError(f"`{key}` in {file} stands in `settings` and in `grid`; remove one")
    for case, overrides in cases.items():
        if compare in overrides:
            raise UserError(
                f"the case `{case}` in {file} sets `{compare}`, which is compared; set `compare: {CASE}`, or leave it "
                "out of the case"
            )
    metric, higher = values.get("metric", "perplexity"), values.get("higher", False)
    if not isinstance(metric, str) or not isinstance(higher, bool):
        raise UserError(f"`metric` and `higher` in {file}: give a key of a run's summary, and true or false")
    return Sweep(
        file,
        base,
        settings,
        Path(absolute(folder)),
        cases,
        grid,
        _seeds(values.get("seeds"), file),
        _skips(values.get("skip", []), cases, factors, file),
        compare,
        text(values["reference"]) if "reference" in values else None,
        metric,
        higher,
    )


def _checked(values: Any, place: str) -> dict[str, Any]:
    """Overrides by dotted name."""
    if not isinstance(values, dict):
        raise UserError(f"{place} = {values!r}: write `section.key: value` lines")
    overrides = config.flat(values)
    for key in set(overrides) & set(_OURS):
        raise UserError(f"`{key}` in {place}: the sweep sets it itself; use {_OURS[key]}")
    known = config.known_keys(RunSettings)
    config.check_keys(overrides, known, place)
    config.check_sections(overrides, known, place)
    return overrides


def _cases(values: Any, file: str) -> dict[str, dict[str, Any]]:
    if not isinstance(values, dict):
        raise UserError(f"`cases` in {file}: write `NAME: {{section.key: value, ...}}` lines")
    for name in values:
        if not re.fullmatch(r"\w[\w.+-]*", str(name)):
            raise UserError(f"the case `{name}` in {file}: it names folders; use letters, digits and `_.+-` only")
    return {str(name): _checked(given or {}, f"{file}, case `{name}`") for name, given in values.items()}


def _grid(values: Any, file: str) -> dict[str, list[Any]]:
    grid = _checked(values, f"{file}, `grid`")
    for key, alternatives in grid.items():
        if not isinstance(alternatives, list) or not alternatives:
            raise UserError(f"`{key}` = {alternatives!r} in {file}, `grid`: give a list of one value or more")
    return grid


def _seeds(values: Any, file: str) -> list[int]:
    if not isinstance(values, list) or not values or any(type(seed) is not int or seed < 0 for seed in values):
        raise UserError(f"`seeds` = {values!r} in {file}: give a list of whole numbers, e.g. `seeds: [0, 1, 2]`")
    if len(set(values)) < len(values):
        raise UserError(f"`seeds` = {values!r} in {file}: one stands twice; remove it")
    return values


def _skips(values: Any, cases: Mapping[str, Any], factors: Sequence[str], file: str) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(entry, dict) and entry for entry in values):
        raise UserError(f"`skip` in {file}: write a list of `{{section.key: value, ...}}`")
    flat = [config.flat(entry) for entry in values]
    for entry in flat:
        for key in entry:
            if key not in factors:
                raise UserError(f"`{key}` in {file}, `skip`, is not varied; {nearest(key, factors)}")
        if CASE in entry and entry[CASE] not in cases:
            raise UserError(
                f"`{CASE}: {entry[CASE]}` in {file}, `skip`: no such case; {nearest(str(entry[CASE]), cases)}"
            )
    return flat


def plan(sweep: Sweep, overrides: Sequence[str]) -> tuple[Sweep, list[Run]]:
    """Every run of a sweep, checked, in order: all settings with the first seed come first.

    ``overrides`` are ``--section.key value`` words for all runs. The sweep comes back with ``reference`` filled in.

    Raises:
        UserError: a setting cannot work, a name stands twice, or a value is given in two places.
    """
    given = config.override_values(overrides)
    for key in given:
        if key in _OURS:
            raise UserError(f"`--{key}` on the command line: the sweep sets it itself; use {_OURS[key]}")
        if key in sweep.grid or any(key in case for case in sweep.cases.values()):
            raise UserError(f"`--{key}` on the command line: {sweep.file} varies it; change it there")
    words = [*sweep.base, *_words(sweep.settings), *overrides]
    config.parse(RunSettings, "llm-cht sweep", words)  # mistakes of the base are told as such
    used: list[dict[str, Any]] = []
    texts: dict[str, str] = {}  # of the compared values: as the file has them -> as the run has them
    planned: dict[str, tuple[Setting, RunSettings]] = {}
    for case, varied in _combinations(sweep):
        raw = ({} if case is None else {CASE: case}) | varied
        skipped = [entry for entry in sweep.skip if _agrees(raw, entry)]
        used += skipped
        if skipped:
            continue
        setting, settings = _setting(sweep, words, case, varied)
        if setting.name in planned:
            raise UserError(
                f"two settings of {sweep.file} have the name `{setting.name}`: remove a value that stands twice, or "
                "name the settings under `cases`"
            )
        planned[setting.name] = (setting, settings)
        if sweep.compare is not None:
            texts[text(raw[sweep.compare])] = setting.factors[sweep.compare]
    for entry in sweep.skip:
        if entry not in used:
            raise UserError(f"{entry} in {sweep.file}, `skip`, leaves nothing out; correct or remove it")
    if not planned:
        raise UserError(f"`skip` in {sweep.file} leaves out every combination; remove an entry")
    sweep = replace(sweep, reference=_reference(sweep, texts))
    return sweep, [
        _run(sweep, setting, settings, seed) for seed in sweep.seeds for setting, settings in planned.values()
    ]


def _words(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as on the command line."""
    return [f"--{key}={text(value)}" for key, value in overrides.items()]


def _combinations(sweep: Sweep) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The case and the values of the grid's keys that it does not set itself."""
    for case in sweep.cases or [None]:
        fixed = {} if case is None else sweep.cases[case]
        keys = [key for key in sweep.grid if key not in fixed]
        for values in itertools.product(*(sweep.grid[key] for key in keys)):
            yield case, dict(zip(keys, values, strict=True))


def _agrees(raw: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return all(key in raw and text(raw[key]) == text(value) for key, value in entry.items())


def _setting(sweep: Sweep, words: list[str], case: str | None, varied: dict[str, Any]) -> tuple[Setting, RunSettings]:
    wanted = ({} if case is None else sweep.cases[case]) | varied
    try:
        settings = config.parse(RunSettings, "llm-cht sweep", words + _words(wanted))
        check(replace(settings, resume="auto"))  # every run is started so
        values = {key: _value(settings, key) for key in wanted}
        settings = resolved(settings)
    except UserError as error:
        where = "" if case is None else f"case `{case}`: "
        shown = ", ".join(f"{key} {text(value)}" for key, value in wanted.items())
        remedy = " (`skip` leaves a combination out; a case may set a key of the grid itself)" if varied else ""
        raise UserError(f"{sweep.file}, {where}{shown or 'no overrides'}: {error}{remedy}") from error
    factors = ({} if case is None else {CASE: case}) | {key: text(values[key]) for key in varied}
    name = "_".join(([] if case is None else [case]) + [_word(key, values[key]) for key in varied])
    if len(name) > _MAX_NAME or not name:
        raise UserError(f"{sweep.file}: the name `{name}` cannot be that of a folder; name the settings under `cases`")
    return Setting(name, factors, values), settings


def _value(settings: RunSettings, key: str) -> Any:
    """The value that a run has for a dotted name, which its type has put right (``1e-3`` is text in YAML)."""
    value: Any = settings
    rest = key.split(".")
    while rest and not isinstance(value, dict):
        value = getattr(value, rest.pop(0))
    return value.get(".".join(rest)) if rest else value


def _word(key: str, value: Any) -> str:
    """What a value adds to the name: text itself (the end of a path), anything else behind the last word of its key."""
    last = key.rpartition(".")[2]
    word = value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else f"{last}{text(value)}"
    return re.sub(r"[^\w.+-]+", "-", word).strip("-.") or last


def _reference(sweep: Sweep, texts: Mapping[str, str]) -> str | None:
    if sweep.reference is None:
        return next(iter(texts.values()), None)
    found = texts.get(sweep.reference, sweep.reference)
    if found not in texts.values():
        raise UserError(
            f"`reference` = {sweep.reference} in {sweep.file} is no value of `{sweep.compare}`; "
            f"{nearest(sweep.reference, texts.values())}"
        )
    return found


def _run(sweep: Sweep, setting: Setting, settings: RunSettings, seed: int) -> Run:
    name = f"{setting.name}_seed{seed}"
    settings = replace(settings, run=str(sweep.folder / name), seed=seed, resume=None)
    check(settings)
    return Run(name, setting, settings)
