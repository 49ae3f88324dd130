"""What a table can show: figures of the summaries of runs, and those that the other programs of this folder wrote.

``zero_shot.py``, ``perplexity.py`` and ``bleu.py`` write JSON on request (``--json``). A row of such a file belongs to
the run whose ``RUN/model`` it names: as a path from here, or, for a file made elsewhere, by the end of that path. What
was measured in different ways (other tasks, texts or options) is refused rather than compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from eval.table_collect import Run
from llm_cht.errors import UserError, nearest
from llm_cht.sweep.settings import text


@dataclass(frozen=True)
class Metric:
    """One figure of a model."""

    name: str
    title: str
    higher: bool
    """whether higher is better"""
    decimals: int
    scale: float = 1.0
    """what it is multiplied with to be shown"""


_KNOWN = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "Validation perplexity", False, 2),
        Metric("test_bleu", "Test BLEU", True, 2),
        Metric("test_bleu_lowercased", "Test BLEU, lowercased", True, 2),
        Metric("bleu", "Validation BLEU", True, 2),
        Metric("bleu_lowercased", "Validation BLEU, lowercased", True, 2),
        Metric("mcc", "Average zero-shot MCC", True, 3),
        Metric("accuracy", "Average zero-shot accuracy, %", True, 2, 100),
        Metric("eval_perplexity", "Perplexity by eval/perplexity.py", False, 2),
        Metric("word_perplexity", "Perplexity per word", False, 2),
        Metric("bits_per_byte", "Bits per byte", False, 3),
        Metric("eval_bleu", "BLEU by eval/bleu.py", True, 2),
        Metric("eval_bleu_lowercased", "BLEU by eval/bleu.py, lowercased", True, 2),
    )
}
_OF_TASK = {"mcc": ("zero-shot MCC", 3, 1.0), "accuracy": ("zero-shot accuracy, %", 2, 100.0)}
_OF_RUNS = {"language_modelling": ("perplexity",), "translation": ("test_bleu", "bleu")}
_OF_FILES = ("mcc", "eval_perplexity", "eval_bleu")


def metric_of(name: str) -> Metric:
    """A metric by name; ``mcc.cola`` and ``accuracy.cola`` are those of a task."""
    kind, _, task = name.partition(".")
    if not task:
        return _KNOWN[name]
    title, decimals, scale = _OF_TASK[kind]
    return Metric(name, f"{task}: {title}", True, decimals, scale)


def choose(wanted: Sequence[str], runs: Sequence[Run], task: str) -> list[Metric]:
    """The metrics to show of the runs of one task: the ``wanted`` that they have, or what stands for the task.

    ``wanted`` may hold patterns (``mcc.*``).
    """
    there = available(runs)
    if wanted:
        return [metric_of(name) for name in there if any(fnmatchcase(name, pattern) for pattern in wanted)]
    own = [name for name in _OF_RUNS.get(task, ()) if name in there][:1]
    return [metric_of(name) for name in [*own, *(name for name in _OF_FILES if name in there)]]


def check_wanted(wanted: Sequence[str], runs: Sequence[Run]) -> None:
    """Refuse a metric, or a pattern of them, that no run has."""
    there = available(runs)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in there):
            raise UserError(f"--metric {pattern}: no run has it; {nearest(pattern, there)} (all: {', '.join(there)})")


def available(runs: Iterable[Run]) -> list[str]:
    """Names of all metrics that a run has."""
    names = {name for run in runs for name in (*run.summary, *run.figures)}
    of_tasks = sorted(name for name in names if "." in name)
    return [name for name in _KNOWN if name in names] + of_tasks


# ---- files of evaluations ----


class Found(NamedTuple):
    """One figure in a file."""

    model: str
    metric: str
    value: float
    how: str
    """what must be equal for two values to be compared"""


def add_evaluations(runs: Sequence[Run], files: Sequence[Path]) -> list[str]:
    """Give each run the figures that ``files`` have of its model; sentences on what belongs to no run.

    Raises:
        UserError: a file cannot be read or is no such file, a model fits several runs, or a figure stands twice.
    """
    notes: dict[str, None] = {}
    for file in files:
        for found in _read(file):
            run = _run_of(found.model, runs, file)
            if run is None:
                notes[f"{found.model} in {file.name} is the model of no run here, and left out."] = None
                continue
            if found.metric in run.figures:
                raise UserError(f"--eval {file}: {found.metric} of {found.model} stands in another file too; give one")
            run.figures[found.metric], run.measured[found.metric] = found.value, found.how
    return list(notes)


def check_alike(metric: str, runs: Sequence[Run]) -> None:
    """Refuse a figure of evaluations that was not measured in one way."""
    first: Run | None = None
    for run in (run for run in runs if metric in run.measured):
        first = first or run
        if run.measured[metric] != first.measured[metric]:
            raise UserError(
                f"{metric} of {first.folder} and of {run.folder} were measured in different ways: "
                f"{first.measured[metric]}; and {run.measured[metric]}; measure both alike, or leave it out of --metric"
            )


def _run_of(model: str, runs: Sequence[Run], file: Path) -> Run | None:
    path = Path(model)
    here = [run for run in runs if (run.folder / "model").resolve() == path.resolve()]
    parts = tuple(part for part in path.parts if part not in ("..", ".", "/"))
    count = len(parts)
    fitting = [run for run in runs if (run.folder / "model").resolve().parts[-count:] == parts] if count > 1 else []
    if len(found := here or fitting) > 1:
        names = ", ".join(str(run.folder) for run in found)
        raise UserError(f"--eval {file}: its model {model} may be that of {names}; name models by their full paths")
    return found[0] if found else None


def _read(file: Path) -> Iterator[Found]:
    if not file.is_file():
        raise UserError(f"--eval {file}: no such file (looked from {Path.cwd()}); correct the path")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(report, dict) and "figures" in report:
            found = list(_zero_shot(report))
        elif isinstance(report, dict):
            found = list(_bleu(report))
        else:
            found = list(_perplexity(report))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"--eval {file}: is nothing that zero_shot.py, perplexity.py or bleu.py wrote with --json ({error!r})"
        ) from error
    if not found:
        raise UserError(f"--eval {file}: holds no figure of a model; measure with it again, or leave it out")
    for model, metric, value, _ in found:
        if not isinstance(model, str) or isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(
                f"--eval {file}: {metric} of {model!r} is {value!r}, where the name of a model and a number belong; "
                "write the file again"
            )
    return iter(found)


def _zero_shot(report: dict[str, Any]) -> Iterator[Found]:
    names = ("num_fewshot", "limit", "seeds", "dtype")
    options = ", ".join(f"{name} {text(report['settings'][name])}" for name in names)
    data = {
        task["task"]: f"{task['documents']} documents" + ", prompt differs" * bool(task["prompt_differs"])
        for task in report["tasks"]
    }
    for row in report["figures"]:
        for name in _OF_TASK:
            if name in row:
                yield Found(row["model"], f"{name}.{row['task']}", row[name], f"{data[row['task']]}, {options}")
    for row in report["averages"]:
        for name in _OF_TASK:
            tasks = [one["task"] for one in report["figures"] if one["model"] == row["model"] and name in one]
            if tasks:
                how = ", ".join(f"{task} ({data[task]})" for task in tasks)
                yield Found(row["model"], name, row[name], f"{how}, {options}")


def _perplexity(rows: list[dict[str, Any]]) -> Iterator[Found]:
    for row in rows:
        how = ", ".join(f"{name} {row[name]}" for name in ("bytes", "sequence_length", "stride", "dtype"))
        yield Found(row["model"], "eval_perplexity", row["perplexity"], f"tokens {row['tokens']}, {how}")
        yield Found(row["model"], "word_perplexity", row["word_perplexity"], how)
        yield Found(row["model"], "bits_per_byte", row["bits_per_byte"], how)


def _bleu(report: dict[str, Any]) -> Iterator[Found]:
    *rows, copied = report["rows"]  # the last row is the source, copied, and so tells one test set from another
    for row in rows:
        for name, signature in zip(("bleu", "lowercased"), report["signatures"], strict=True):
            metric = "eval_bleu" if name == "bleu" else "eval_bleu_lowercased"
            yield Found(row["model"], metric, row[name], f"{signature}, copying {copied[name]:.6g}")
