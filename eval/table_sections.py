"""The runs of a table sorted into sections, rows and cells, so that only repetitions share a cell.

- A section holds the runs of one task, model and data: figures of different ones are never compared.
- A row is a method. Where runs of one method and sparsity differ in more than the seed, each value of what differs is a
  row of its own, with that setting in its name; so nothing is averaged but seeds, and what ``--ignore`` names.
- A cell holds the runs of one row at one sparsity, and counts one figure a seed: over an ignored setting, figures are
  averaged within the seed first, for as repetitions they would make the standard error too small.

What differs between rows is told below the table, not hidden: a dense model may well have another learning rate.
Rejected: the names of a sweep's cases as methods, which say nothing for runs made by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from eval.table_collect import DENSE, Run, Settings, percent
from llm_cht import config
from llm_cht.errors import UserError
from llm_cht.sweep.settings import text
from llm_cht.topology.presets import PRESETS, preset

_NO_PART = {
    *("run", "seed", "resume", "method.preset", "method.sparsity", "method.force", "method.workspace_mb"),
    *("model.attention", "data.cache_dir", "pairs.cache_dir", "validation.max_tokens", "validation.batch_size"),
    *("train.device", "train.micro_batch_size", "train.micro_batch_tokens", "train.activation_checkpointing"),
    *("train.compile", "train.timeout_s", "train.on_nonfinite", "train.max_skipped", "checkpoint.keep_last"),
    "validation.decode.batch_tokens",
}
"""what a run is told apart by elsewhere, and how it is computed or watched"""


@dataclass
class Row:
    """One method with the settings that tell it from other rows of that method."""

    preset: str
    label: Settings
    cells: dict[float, list[Run]]
    """sparsity -> the runs, which differ in the seed and in ignored settings only"""

    @property
    def name(self) -> str:
        """As the table shows it."""
        label = ", ".join(f"{key} {text(value)}" for key, value in self.label.items())
        return f"{self.preset} ({label})" if label else self.preset

    def at(self, *sparsities: float) -> str:
        """Its name and sparsities, of which a dense model has none."""
        at = "" if self.preset == DENSE or not sparsities else f" at {', '.join(map(percent, sparsities))}"
        return self.name + at


@dataclass
class Section:
    """The runs of one task, model and data."""

    title: str
    task: str
    rows: list[Row]
    notes: list[str]

    @property
    def runs(self) -> list[Run]:
        """All of its rows."""
        return [run for row in self.rows for runs in row.cells.values() for run in runs]

    @property
    def sparsities(self) -> list[float]:
        """The columns: those of the sparse rows; 0 where all is dense."""
        return sorted({sparsity for row in self.rows if row.preset != DENSE for sparsity in row.cells}) or [0.0]


def sections_of(runs: Sequence[Run], ignored: Collection[str], best: Sequence[str]) -> list[Section]:
    """The sections of a table; ``best`` names settings of which each cell takes the value with the best validation.

    Raises:
        UserError: two runs would be one and the same repetition, or ``ignored`` or ``best`` names what is no setting.
    """
    known = dict.fromkeys(_keys(runs), False)
    config.check_keys(ignored, known, "--ignore")
    config.check_keys(best, known, "--best")
    of_place: dict[tuple[str, ...], list[Run]] = {}
    about = [key for key in _keys(runs) if _is_place(key) and key not in ignored]
    for run in runs:
        place = (run.task, *(text(run.settings.get(key)) for key in about if _counts(key, run)))
        of_place.setdefault(place, []).append(run)
    found = [_section(group, about, ignored, best) for group in of_place.values()]
    for section in found:
        section.notes += _averaged(section, ignored)
    alike = [section for section in found if [other.title for other in found].count(section.title) > 1]
    if alike:
        varied = _varying([section.runs[0] for section in alike], about)[0]
        for section in alike:
            settings = section.runs[0].settings
            section.title += f" ({', '.join(f'{key} {text(settings.get(key))}' for key in varied)})"
    return found


def _is_place(key: str) -> bool:
    return key.startswith(("model.", "data.", "pairs.")) and key not in _NO_PART


def _counts(key: str, run: Run) -> bool:
    """Whether a setting has a meaning for a run: a language model has no pairs, a dense one no topology."""
    unused = "data." if run.task == "translation" else "pairs."
    if run.preset == DENSE and key.startswith(("method.", "lr.rewarm")):
        return False
    return not key.startswith((unused, "metrics.")) and key not in _NO_PART


def _keys(runs: Iterable[Run]) -> list[str]:
    """All settings, the length of a run first: others follow from it, which nobody set."""
    return list(dict.fromkeys(["train.steps", *(key for run in runs for key in run.settings)]))


def _varying(runs: Sequence[Run], keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """The keys that tell ``runs`` apart, and those that vary but tell no more than the ones before."""
    telling: list[str] = []
    besides = []
    parts: list[tuple[str, ...]] = [() for _ in runs]
    for key in keys:
        values = [_setting(key, run) or "" for run in runs]
        finer = [(*part, value) for part, value in zip(parts, values, strict=True)]
        if len(set(finer)) > len(set(parts)):
            telling, parts = [*telling, key], finer
        elif len(set(values)) > 1:
            besides.append(key)
    return telling, besides


def _section(runs: list[Run], about: Sequence[str], ignored: Collection[str], best: Sequence[str]) -> Section:
    keys = [key for key in _keys(runs) if key not in ignored and key not in about]
    rows: list[Row] = []
    notes = []
    for name in sorted({run.preset for run in runs}, key=_order):
        ours = [run for run in runs if run.preset == name]
        telling: dict[str, None] = {}
        besides: dict[str, None] = {}
        for sparsity in sorted({run.sparsity for run in ours}):
            first, second = _varying([run for run in ours if run.sparsity == sparsity], keys)
            telling |= dict.fromkeys(first)
            besides |= dict.fromkeys(second)
        if rest := [key for key in besides if key not in telling]:
            notes.append(f"{name}: with {_quoted(telling)} varies {_quoted(rest)}.")
        rows += _rows(name, ours, list(telling))
    for row in rows:
        _check_seeds(row, ignored)
    task = runs[0].task
    for key in best:
        rows, told = _choose(rows, key, task)
        notes += told
    section = Section(_title(runs[0]), task, rows, notes)
    notes += _differences(section, [key for key in keys if key not in best])
    return section


def _order(name: str) -> tuple[int, str]:
    return (list(PRESETS).index(name) if name in PRESETS else len(PRESETS), name)


def _rows(name: str, runs: Sequence[Run], telling: Sequence[str]) -> list[Row]:
    rows: dict[str, Row] = {}
    for run in runs:
        label = {key: run.settings.get(key) for key in telling}
        row = rows.setdefault(text(label), Row(name, label, {}))
        row.cells.setdefault(run.sparsity, []).append(run)
    for row in rows.values():
        for cell in row.cells.values():
            cell.sort(key=lambda run: run.settings["seed"])
    return sorted(rows.values(), key=lambda row: [_ranked(value) for value in row.label.values()])


def _ranked(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then all else by its text."""
    number = type(value) in (int, float)
    return (not number, value if number else 0.0, "" if number else text(value))


def _check_seeds(row: Row, ignored: Collection[str]) -> None:
    for sparsity, runs in row.cells.items():
        of_seed: dict[str, Run] = {}
        for run in runs:
            seed = run.settings["seed"]
            if (other := of_seed.setdefault(text([seed, _values(run, ignored)]), run)) is not run:
                raise UserError(
                    f"{other.folder} and {run.folder} are both {row.at(sparsity)} with seed {seed}: "
                    "as repetitions they would count twice; give one of them"
                )


def _values(run: Run, keys: Iterable[str]) -> list[Any]:
    return [run.settings.get(key) for key in keys]


def _averaged(section: Section, ignored: Collection[str]) -> list[str]:
    """Sentences on the ignored settings that were averaged over, and on cells whose seeds have not the same values."""
    cells = [(row, sparsity, runs) for row in section.rows for sparsity, runs in row.cells.items()]
    averaged = [
        key for key in ignored if any(len({text(_values(run, [key])) for run in runs}) > 1 for _, _, runs in cells)
    ]
    uneven = []
    for row, sparsity, runs in cells:
        of_seed: dict[int, set[str]] = {}
        for run in runs:
            of_seed.setdefault(run.settings["seed"], set()).add(text(_values(run, averaged)))
        if any(values != of_seed[runs[0].settings["seed"]] for values in of_seed.values()):
            uneven.append(row.at(sparsity))
    told = f"; not every seed has the same values of {'; '.join(uneven)}" if uneven else ""
    return [f"Averaged over {_quoted(averaged)}, within each seed first{told}."] if averaged else []


def figures_over_seeds(runs: Iterable[Run], metric: str) -> list[float]:
    """A figure of each seed that has it: the mean over its runs, which differ in ignored settings."""
    of_seed: dict[int, list[float]] = {}
    for run in runs:
        if (value := run.figure(metric)) is not None:
            of_seed.setdefault(run.settings["seed"], []).append(value)
    return [fmean(values) for values in of_seed.values()]


def _title(run: Run) -> str:
    settings = run.settings
    model = settings.get("model.path") or settings.get("model.config") or "model"
    data = settings.get("pairs.train" if run.task == "translation" else "data.source")
    names = data if isinstance(data, list) else [data]
    shown = ", ".join(_last(name) for name in names[:2]) + (", ..." if len(names) > 2 else "")
    if run.task == "translation":
        shown = f"{shown}, {settings.get('pairs.source')} to {settings.get('pairs.target')}"
    return f"{_last(model)} on {shown}"


def _last(name: Any) -> str:
    """The end of a path; for a file the folder too, which often names the data."""
    parts = [part for part in str(name).split("/") if part]
    return "/".join(parts[-2:]) or str(name)


# ---- what is told of the settings ----


def _choose(rows: list[Row], key: str, task: str) -> tuple[list[Row], list[str]]:
    """Rows of which those that differ in ``key`` only are one, with the best runs of each cell; and what was chosen."""
    metric, higher = ("bleu", True) if task == "translation" else ("perplexity", False)
    merged: dict[str, list[Row]] = {}
    for row in rows:
        rest = {name: value for name, value in row.label.items() if name != key}
        merged.setdefault(text([row.preset, rest]), []).append(row)
    chosen, told = [], []
    for alike in merged.values():
        rest = {name: value for name, value in alike[0].label.items() if name != key}
        chosen.append(joined := Row(alike[0].preset, rest, {}))
        for sparsity in sorted({sparsity for row in alike for sparsity in row.cells}):
            tried = [(text(row.label.get(key)), row.cells[sparsity]) for row in alike if sparsity in row.cells]
            most = max(len(runs) for _, runs in tried)
            complete = [(value, runs) for value, runs in tried if len(runs) == most]
            value, joined.cells[sparsity] = min(complete, key=lambda pair: _rank(pair[1], metric, higher))
            if len(tried) > 1:
                told.append(f"{joined.at(sparsity)}: {value} of {', '.join(one for one, _ in tried)}")
    what = f"of each cell the value with the best validation {'BLEU' if higher else 'perplexity'}"
    return chosen, [f"`{key}`, {what}, among those with the most seeds: {'; '.join(told)}."] if told else []


def _rank(runs: Sequence[Run], metric: str, higher: bool) -> float:
    """Lower is better; one that is not finite is worst."""
    if any(run.figure(metric) is None for run in runs):
        return float("inf")
    return (-1 if higher else 1) * fmean(figures_over_seeds(runs, metric))


def _differences(section: Section, keys: Iterable[str]) -> list[str]:
    """Sentences on the settings that make a row another than its name says."""
    shown = {key for row in section.rows for key in row.label}
    in_presets = {f"method.{key}" for key in PRESETS[DENSE]}
    alike: dict[str, list[tuple[str, list[str]]]] = {}
    for key in keys:
        found = _places(section, partial(_setting, key))
        if len(found) > 1 and key not in shown and key not in in_presets:
            alike.setdefault(text([*found.values()]), []).append((key, [*found]))
    notes = []
    for rows, settings in alike.items():
        values = zip(*(values for _, values in settings), strict=True)
        places = json.loads(rows)
        most = max(places, key=len)
        names = ["the others" if place is most and len(most) > 3 else ", ".join(place) for place in places]
        told = "; ".join(f"{', '.join(value)} in {name}" for value, name in zip(values, names, strict=True))
        notes.append(f"{_quoted(key for key, _ in settings)}: {told}.")
    own = _places(section, lambda run: _own_settings(run, shown) or None)
    return notes + [f"Not as its preset has it: {', '.join(rows)}: {settings}." for settings, rows in own.items()]


def _setting(key: str, run: Run) -> str | None:
    return text(run.settings.get(key)) if _counts(key, run) else None


def _places(section: Section, value_of: Callable[[Run], str | None]) -> dict[str, list[str]]:
    """Values -> the rows whose runs have them: a method if all its rows do, with sparsities where not all agree."""
    found: dict[str, list[tuple[Row, list[float]]]] = {}
    for row in section.rows:
        here: dict[str, list[float]] = {}
        for sparsity, runs in sorted(row.cells.items()):
            for value in dict.fromkeys(map(value_of, runs)):
                if value is not None:
                    here.setdefault(value, []).append(sparsity)
        for value, sparsities in here.items():
            found.setdefault(value, []).append((row, [] if len(here) == 1 else sparsities))
    of_preset = [row.preset for row in section.rows]
    named: dict[str, list[str]] = {}
    for value, places in found.items():
        whole = [row.preset for row, at in places if not at]
        names = [
            row.preset if whole.count(row.preset) == of_preset.count(row.preset) else row.at(*at) for row, at in places
        ]
        named[value] = list(dict.fromkeys(names))
    return named


def _own_settings(run: Run, shown: Collection[str]) -> str:
    """The settings of a method that are not its preset's."""
    if run.preset == DENSE or run.preset not in PRESETS:
        return ""
    own = []
    for key, value in preset(run.preset, run.task).items():
        name = f"method.{key}"
        if name not in shown and run.settings.get(name, value) not in (value, None):
            own.append(f"`{name}` {text(run.settings[name])}")
    return ", ".join(own)


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
