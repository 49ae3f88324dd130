"""A picture of a table: each metric against sparsity, a line a method with its errors, and the dense model's level.

Sparsities stand at equal distances, and methods a little beside each other, so that errors do not hide each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.table_collect import DENSE, percent
from eval.table_grid import value_of
from eval.table_metrics import Metric
from eval.table_sections import Section
from eval.table_write import Part
from llm_cht.errors import UserError

_INK, _GREY, _GRID = "#20262e", "#7b838d", "#e8ebee"
_COLOURS = (
    "#1f5f8b",
    "#d9983a",
    "#3aa69b",
    "#b8432f",
    "#7a5195",
    "#86b3d9",
    "#c9a227",
    "#5b8c3a",
    "#7b838d",
    "#d16ba5",
)
_MARKERS = "os^Dv<>pPX"
_SPREAD = 0.5  # of the distance between two sparsities, over which the methods stand


def plot(parts: Sequence[Part], path: Path) -> None:
    """Draw a panel for each section and metric.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    panels = [(part.section, metric) for part in parts for metric in part.metrics]
    if not panels:
        raise UserError(f"--plot {path}: there is no metric to draw; leave it out")
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * lines))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (section, metric) in zip(axes, panels, strict=False):
        _panel(axis, section, metric)
    for axis in axes[len(panels) :]:
        axis.remove()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}; give another file") from error


def _panel(axes: Any, section: Section, metric: Metric) -> None:
    sparsities = section.sparsities
    sparse = [row for row in section.rows if row.preset != DENSE]
    for number, row in enumerate(sparse):
        shift = _SPREAD * ((number + 0.5) / len(sparse) - 0.5)
        found = [(place, value_of(row.cells.get(at, ()), metric.name)) for place, at in enumerate(sparsities)]
        known = [(place + shift, value) for place, value in found if value]
        axes.errorbar(
            [place for place, _ in known],
            [metric.scale * value.mean for _, value in known],
            yerr=[math.nan if value.error is None else metric.scale * value.error for _, value in known],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=1.2,
            markersize=4.5,
            capsize=2.5,
            elinewidth=1.0,
            label=row.name,
        )
    for row in section.rows:
        value = value_of(row.cells.get(0.0, ()), metric.name) if row.preset == DENSE else None
        if value:
            level, error = metric.scale * value.mean, metric.scale * (value.error or 0.0)
            axes.axhline(level, color=_INK, linewidth=1.0, linestyle=(0, (5, 3)), label=row.name)
            axes.axhspan(level - error, level + error, color=_INK, alpha=0.08, linewidth=0)
    axes.set_title(section.title, fontsize=9, loc="left", color=_INK)
    axes.set_ylabel(f"{metric.title} ({'higher' if metric.higher else 'lower'} is better)", fontsize=8.5, color=_GREY)
    axes.set_xlabel("sparsity", fontsize=8.5, color=_GREY)
    axes.set_xticks(range(len(sparsities)), [percent(sparsity) for sparsity in sparsities])
    axes.set_xlim(-0.5, len(sparsities) - 0.5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
