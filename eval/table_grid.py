"""The tables of a section: methods x sparsities of one metric, then density and FLOPs in the same shape.

A figure is the mean over seeds with its standard error, and without one where there is one seed. The best sparse figure
of a column is bold, and a star says that it is better than the dense model's, as in the papers; a cell of which a seed
diverged gets neither, for the mean of those that survived is no figure of the method. Figures of the papers stand in
columns of their own that name where they were printed: they are of other runs, and never averaged or compared.
Rejected: density and FLOPs as further columns, which makes rows that no page holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.table_collect import DENSE, Run, percent
from eval.table_metrics import Metric, check_alike, metric_of
from eval.table_sections import Row, Section, figures_over_seeds
from llm_cht.errors import UserError, nearest
from llm_cht.sweep.table import mean_and_error

PAPERS = Path(__file__).with_name("papers.json")


class Value(NamedTuple):
    """Mean over the seeds of one row at one sparsity."""

    mean: float
    error: float | None
    """standard error of the mean; None for one seed"""
    seeds: int
    """how many have the figure; 0 for a printed one"""


class Cell(NamedTuple):
    """What stands in a cell."""

    text: str = "-"
    bold: bool = False
    star: bool = False


@dataclass(frozen=True)
class Block:
    """Columns that belong together."""

    heading: str
    columns: list[str]
    rows: list[list[Cell]]
    """a cell a column; or a single one for all columns, of the dense model"""


@dataclass(frozen=True)
class Grid:
    """One table."""

    title: str
    names: list[str]
    """of the rows"""
    blocks: list[Block]
    notes: list[str]


@dataclass(frozen=True)
class Paper:
    """Figures that a paper prints for one model and data set."""

    name: str
    paper: str
    table: str
    title: str
    metric: str
    about: str
    sparsities: list[float]
    figures: dict[str, list[list[float | None] | None]]
    """method -> (mean, standard error) for each sparsity, None where not printed; a single one for dense"""

    @property
    def source(self) -> str:
        """As a column names it."""
        return f"{self.paper}, {self.table} ({self.title})"

    def value(self, method: str, sparsity: float) -> Value | None:
        """What is printed, if it is."""
        printed = self.figures.get(method)
        pair = None if printed is None else printed[0 if method == DENSE else self.sparsities.index(sparsity)]
        return None if pair is None or pair[0] is None else Value(pair[0], pair[1], 0)


def load_papers() -> dict[str, Paper]:
    """All printed tables by name."""
    tables: list[dict[str, Any]] = json.loads(PAPERS.read_text(encoding="utf-8"))["tables"]
    return {table["name"]: Paper(**table) for table in tables}


def find_papers(names: Sequence[str], sections: Sequence[tuple[Section, Sequence[Metric]]]) -> list[Paper]:
    """The printed tables of these names.

    Raises:
        UserError: there is none, or it has no place in the tables of ``sections``.
    """
    papers = load_papers()
    found = []
    for name in dict.fromkeys(names):
        if name not in papers:
            raise UserError(f"--paper {name}: no such table; {nearest(name, papers)} (--papers lists them)")
        paper = papers[name]
        fitting = [section for section, metrics in sections if paper.metric in [metric.name for metric in metrics]]
        if not fitting:
            raise UserError(
                f"--paper {name}: prints {metric_of(paper.metric).title}, which no table here shows; see --metric"
            )
        if len(fitting) > 1:
            titles = "; ".join(section.title for section in fitting)
            raise UserError(
                f"--paper {name}: would stand beside several models or data sets ({titles}); give the runs of one"
            )
        if not set(paper.sparsities) & set(fitting[0].sparsities):
            printed, ours = (", ".join(map(percent, one)) for one in (paper.sparsities, fitting[0].sparsities))
            raise UserError(f"--paper {name}: prints {printed}, the runs have {ours}; leave it out")
        found.append(paper)
    return found


def value_of(runs: Sequence[Run], metric: str) -> Value | None:
    """Mean and standard error over the seeds of a cell that have the figure."""
    values = figures_over_seeds(runs, metric)
    return Value(*mean_and_error(values), len(values)) if values else None


def is_whole(runs: Sequence[Run], metric: str) -> bool:
    """Whether no run of a cell has a figure that is not finite: such a cell wins nothing."""
    return all(run.figure(metric) is not None for run in runs if run.has(metric))


def winners(section: Section, metric: Metric) -> set[tuple[str, float]]:
    """Row and sparsity of the best sparse figure, over cells of which no seed diverged, where a column has several."""
    best: set[tuple[str, float]] = set()
    for sparsity in section.sparsities:
        here = {
            row.name: value.mean
            for row in section.rows
            if row.preset != DENSE and (value := value_of(row.cells.get(sparsity, ()), metric.name))
        }
        whole = {row.name for row in section.rows if is_whole(row.cells.get(sparsity, ()), metric.name)}
        fit = {name: mean for name, mean in here.items() if name in whole}
        if len(here) > 1 and fit:
            top = (max if metric.higher else min)(fit.values())
            best |= {(name, sparsity) for name, mean in fit.items() if mean == top}
    return best


# ---- tables ----


def grids_of(section: Section, metrics: Sequence[Metric], papers: Sequence[Paper]) -> list[Grid]:
    """All tables of a section."""
    shown = [_metric_grid(section, metric, [p for p in papers if p.metric == metric.name]) for metric in metrics]
    density = _plain_grid(
        section, "Density: average over training (at the end)", ("average_density", "density"), _short
    )
    flops = _plain_grid(section, "Training FLOPs (relative to the dense model)", ("flops", "flops_relative"), _short)
    return [*shown, *(grid for grid in (density, flops) if grid)]


def _metric_grid(section: Section, metric: Metric, papers: Sequence[Paper]) -> Grid:
    check_alike(metric.name, section.runs)
    counts = {
        value.seeds
        for row in section.rows
        for runs in row.cells.values()
        if (value := value_of(runs, metric.name)) is not None
    }
    best, several = winners(section, metric), len(counts) > 1
    dense = {row.name: value_of(row.cells[0.0], metric.name) for row in section.rows if row.preset == DENSE}
    bounds = [value.mean for value in dense.values() if value]
    bound = (max if metric.higher else min)(bounds) if bounds else None

    def cell(row: Row, sparsity: float) -> Cell:
        runs = row.cells.get(sparsity, ())
        value = value_of(runs, metric.name)
        if value is None:
            return Cell()
        beats = bound is not None and row.preset != DENSE and is_whole(runs, metric.name)
        beats = beats and (value.mean > bound if metric.higher else value.mean < bound)  # type: ignore[operator]
        return Cell(_shown(value, metric, several), (row.name, sparsity) in best, beats)

    heading = "these runs" if papers else ""
    blocks = [_block(section, heading, section.sparsities, cell)]
    for paper in papers:
        sparsities = [sparsity for sparsity in paper.sparsities if sparsity in section.sparsities]

        def printed(row: Row, sparsity: float, paper: Paper = paper) -> Cell:
            value = paper.value(row.preset, sparsity)
            return Cell() if value is None else Cell(_shown(value, metric, False))

        blocks.append(_block(section, paper.source, sparsities, printed))
    title = f"{metric.title} ({'higher' if metric.higher else 'lower'} is better)"
    stars = any(cell.star for row in blocks[0].rows for cell in row)
    notes = [_seeds_note(counts, several), *_marks(bool(best), stars, section, metric), *_missing(section, metric)]
    notes += [
        f"{paper.source}: {paper.about}; not of these runs: another code, maybe another model." for paper in papers
    ]
    return Grid(title, [row.name for row in section.rows], blocks, [note for note in notes if note])


def _plain_grid(section: Section, title: str, keys: tuple[str, str], show: Callable[[float], str]) -> Grid | None:
    """Means of one figure with those of another in brackets; None if no run has them."""

    def cell(row: Row, sparsity: float) -> Cell:
        runs = row.cells.get(sparsity, ())
        first, second = (value_of(runs, key) for key in keys)
        return Cell(f"{show(first.mean)} ({show(second.mean)})") if first and second else Cell()

    block = _block(section, "", section.sparsities, cell)
    if all(cell == Cell() for row in block.rows for cell in row):
        return None
    return Grid(title, [row.name for row in section.rows], [block], [])


def _block(section: Section, heading: str, sparsities: Sequence[float], cell: Callable[[Row, float], Cell]) -> Block:
    rows = [
        [cell(row, 0.0)] if row.preset == DENSE else [cell(row, sparsity) for sparsity in sparsities]
        for row in section.rows
    ]
    return Block(heading, [percent(sparsity) for sparsity in sparsities], rows)


def _shown(value: Value, metric: Metric, with_count: bool) -> str:
    mean, error = metric.scale * value.mean, None if value.error is None else metric.scale * value.error
    decimals = metric.decimals
    if error and round(error, decimals) == 0:
        decimals = 1 - math.floor(math.log10(error))  # two digits of it, for it is not 0
    if abs(mean) >= 1e6:
        shown = _short(mean) + ("" if error is None else f" ± {_short(error)}")
    else:
        shown = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # no -0.000
        shown += "" if error is None else f" ± {error:.{decimals}f}"
    return f"{shown} ({value.seeds})" if with_count else shown


def _short(value: float) -> str:
    """Three digits."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if abs(value) >= 1e6 else f"{value:.3g}"


def _seeds_note(counts: set[int], several: bool) -> str:
    if several:
        return "Mean over seeds ± its standard error; in brackets the number of seeds, and no error where it is 1."
    return (
        ""
        if not counts
        else "One seed each: no error."
        if counts == {1}
        else (f"Mean over {counts.copy().pop()} seeds ± its standard error.")
    )


def _marks(bold: bool, stars: bool, section: Section, metric: Metric) -> list[str]:
    notes = ["bold: the best sparse figure of its column"] * bold + ["*: better than dense"] * stars
    notes += ["neither where a seed diverged"] * (bool(notes) and not is_whole(section.runs, metric.name))
    return [f"{'; '.join(notes).capitalize()}."] if notes else []


def _missing(section: Section, metric: Metric) -> list[str]:
    diverged = [str(run.folder) for run in section.runs if run.has(metric.name) and run.figure(metric.name) is None]
    lacking = [str(run.folder) for run in section.runs if not run.has(metric.name)]
    return [
        f"Left out, for {reason}: {', '.join(folders)}."
        for reason, folders in (
            (f"their {metric.name} is not finite", diverged),
            (f"they have no {metric.name}", lacking),
        )
        if folders
    ]
