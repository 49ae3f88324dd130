"""From what the jobs of ``eval/zero_shot.py`` found to figures, a Markdown table and a bar chart.

A row of the table is a task and a figure, a column a model, so that any number of models stand side by side; the first
figures are those of the data, which is what a model gets that always says the most frequent label. The report is one
JSON value with labels and predictions in it: table and chart follow from it, and everything can be computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.scores import balance, score
from llm_cht.errors import UserError

Record = dict[str, Any]

_SPELLED_OUT = 4  # classes of which every share is shown
_INK = "#20262e"
_COLOURS = ("#1f5f8b", "#d9983a", "#3aa69b", "#b8432f", "#7a5195", "#86b3d9", "#c9a227", "#7b838d")


def figures_of(model: str, task: Record, found: Sequence[Record], resamples: int) -> Record:
    """Figures of one model on one task from what was found with each seed."""
    first = found[0]
    figures: Record = {
        "model": model,
        "task": task["task"],
        "cut": max(record["cut"] for record in found),
        "lm_eval": [record["lm_eval"] for record in found],
    }
    if task["classes"]:
        num_classes = len(task["classes"])
        predictions = np.array([record["predictions"] for record in found])
        scores = score(np.array(first["labels"]), predictions, num_classes, resamples, seed=0)
        figures |= {"mcc": scores.mcc, "mcc_error": scores.mcc_error, "mcc_seeds": scores.mcc_seeds}
        figures |= {"predicted": balance(predictions, num_classes), "predictions": predictions.tolist()}
    elif "correct" in first:
        correct = np.array([record["correct"] for record in found])
        scores = score(np.ones(correct.shape[1], dtype=int), correct, 2, resamples, seed=0)
        figures["correct"] = correct.tolist()
    else:
        return figures
    figures |= {"accuracy": scores.accuracy, "accuracy_error": scores.accuracy_error}
    return figures | {"accuracy_seeds": scores.accuracy_seeds}


def averages(figures: Sequence[Record]) -> Record:
    """Averages over the tasks of one model; their errors take the tasks for independent.

    The average MCC is over the classifications: tasks whose documents have choices of their own (COPA, HellaSwag) have
    no classes to correlate. The average accuracy is over all tasks that have one.
    """
    record: Record = {}
    for name in ("accuracy", "mcc"):
        values = [row[name] for row in figures if name in row]
        errors = [row[f"{name}_error"] for row in figures if name in row]
        record[f"{name}_tasks"] = len(values)
        record[name] = math.fsum(values) / len(values) if values else None
        record[f"{name}_error"] = math.hypot(*errors) / len(errors) if errors else None
    return record


# ---- Markdown ----


def markdown(report: Record) -> str:
    """The table of a report, and sentences on what has to be known to read it."""
    names = [model["model"] for model in report["models"]]
    rows = [["task", "figure", "data", *names]]
    for task in report["tasks"]:
        of_model = {row["model"]: row for row in report["figures"] if row["task"] == task["task"]}
        rows += _rows_of(task, [of_model[name] for name in names])
    for label, name, scale, digits in (("accuracy %", "accuracy", 100, 2), ("MCC", "mcc", 1, 3)):
        cells = [_value(average, name, scale, digits) for average in report["averages"]]
        tasks = report["averages"][0][f"{name}_tasks"]
        rows += [[f"average of {tasks}", label, "", *cells]] if tasks else []
    if any(model["sparsity"] is not None for model in report["models"]):
        cells = ["-" if model["sparsity"] is None else f"{model['sparsity']:.4g}" for model in report["models"]]
        rows.append(["sparsity", "", "", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([*lines, "", *_notes(report)]) + "\n"


def _rows_of(task: Record, figures: Sequence[Record]) -> list[list[str]]:
    name = f"{task['task']} ({task['documents']:,})" + (" (prompt differs)" if task["prompt_differs"] else "")
    if "accuracy" not in figures[0]:
        keys = [key for key in figures[0]["lm_eval"][0] if "stderr" not in key]
        means = {key: [np.mean([found[key] for found in row["lm_eval"]]) for row in figures] for key in keys}
        return [[name, key.split(",")[0], "", *(f"{value:.4g}" for value in means[key])] for key in keys]
    shares = task["balance"]
    cells = [_value(row, "accuracy", 100, 2) for row in figures]
    rows = [[name, "accuracy %", f"{100 * max(shares):.2f}" if shares else "", *cells]]
    if shares:
        rows.append(["", "MCC", "0", *(_value(row, "mcc", 1, 3) for row in figures)])
        says = [_shares(task["classes"], row["predicted"]) for row in figures]
        rows.append(["", "labels %", _shares(task["classes"], shares), *says])
    return rows


def _value(record: Record, name: str, scale: float, digits: int) -> str:
    if record[name] is None:
        return "-"
    value = round(scale * record[name], digits) + 0.0  # no -0.000
    seeds = record.get(f"{name}_seeds", ())
    over_seeds = f" ({scale * np.std(seeds, ddof=1):.{digits}f})" if len(seeds) > 1 else ""
    return f"{value:.{digits}f} ± {scale * record[f'{name}_error']:.{digits}f}{over_seeds}"


def _shares(classes: Sequence[str], shares: Sequence[float]) -> str:
    """Each class with its share; "only X" where there is but one."""
    if 1 in shares:
        return f"**only {classes[shares.index(1)]}**"
    order = range(len(classes)) if len(classes) <= _SPELLED_OUT else np.argsort(shares)[::-1][:2]
    return ", ".join(f"{classes[label]} {100 * shares[label]:.1f}" for label in order)


def _notes(report: Record) -> list[str]:
    settings, notes = report["settings"], []
    notes.append(
        f"± is the standard error over {settings['bootstrap']} bootstrap resamples of the documents; `data` is what "
        "always saying the most frequent label gives, and the balance of the labels; `labels %` of a model, of what it "
        "says."
    )
    if settings["num_fewshot"]:
        seeds = ", ".join(map(str, settings["seeds"]))
        spread = " (in brackets: standard deviation over them)" if len(settings["seeds"]) > 1 else ""
        notes.append(f"{settings['num_fewshot']} shots, means over the seeds {seeds} that draw them{spread}.")
    if settings["limit"]:
        notes.append(f"Only the first {settings['limit']:,} documents of each task.")
    notes += [f"{row['task']}: {row['reason']}." for row in report["skipped"]]
    notes += [
        f"{task['task']}: prompt differs from lm-eval's: the file has only `ctx`, whose last sentence is not "
        "capitalized; the choices are the same."
        for task in report["tasks"]
        if task["prompt_differs"]
    ]
    for model in report["models"]:
        rows = [row for row in report["figures"] if row["model"] == model["model"] and row["cut"]]
        if rows:
            cut = ", ".join(f"{row['task']} {row['cut']:,}" for row in rows)
            notes.append(
                f"{model['model']}: prompts, one a choice, that lost their beginning, longer than its positions: {cut}."
            )
    return [line for note in notes for line in (note, "")][:-1]


# ---- chart ----


def chart(report: Record, path: Path) -> None:
    """Draw MCC and accuracy of every model, with errors, as bars.

    Raises:
        UserError: the file cannot be written.
    """
    panels = [name for name in ("mcc", "accuracy") if any(name in row for row in report["figures"])]
    if not panels:
        raise UserError(f"--plot {path}: no task here has an accuracy to draw; leave it out")
    figure = Figure(figsize=(max(7.0, 2.2 + 0.75 * (len(report["tasks"]) + 1)), 0.6 + 2.8 * len(panels)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, name in zip(axes, panels, strict=True):
        _bars(axis, report, name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}; give another file") from error


def _bars(axes: Any, report: Record, name: str) -> None:
    scale, title, label = {
        "mcc": (1, "x: says one label to everything", "Matthews correlation"),
        "accuracy": (100, "line: always the most frequent label", "accuracy %"),
    }[name]
    of_pair = {(row["model"], row["task"]): row for row in report["figures"] if name in row}
    tasks = [task for task in report["tasks"] if (report["models"][0]["model"], task["task"]) in of_pair]
    width = 0.8 / len(report["models"])
    for number, average in enumerate(report["averages"]):
        rows = [*(of_pair[average["model"], task["task"]] for task in tasks), average]
        places = np.arange(len(rows)) + (number + 0.5) * width - 0.4
        heights, errors = ([scale * row[key] for row in rows] for key in (name, f"{name}_error"))
        style = {"color": _COLOURS[number % len(_COLOURS)], "label": average["model"]}
        axes.bar(places, heights, width, yerr=errors, error_kw={"elinewidth": 0.9}, **style)
        if name == "mcc":
            constant = [place for place, row in zip(places, rows, strict=True) if 1 in row.get("predicted", ())]
            axes.plot(constant, [0] * len(constant), "x", color=style["color"])
    for place, task in enumerate(tasks):
        if name == "accuracy" and task["balance"]:
            axes.hlines(scale * max(task["balance"]), place - 0.45, place + 0.45, color=_INK, linewidth=1.2)
    axes.set_title(title, fontsize=8, loc="left", color="#7b838d")
    axes.set_ylabel(label)
    axes.set_xticks(range(len(tasks) + 1), [*(task["task"] for task in tasks), "average"])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.margins(x=0.02)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8ebee")
    axes.set_axisbelow(True)
