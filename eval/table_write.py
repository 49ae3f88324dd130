"""The tables as text: Markdown, LaTeX (booktabs), and CSV with one row a cell."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from eval.table_collect import DENSE
from eval.table_grid import Block, Cell, Grid, Paper, value_of, winners
from eval.table_metrics import Metric
from eval.table_sections import Section
from llm_cht.sweep.table import markdown as table_lines


@dataclass(frozen=True)
class Part:
    """A section with what is shown of it."""

    section: Section
    metrics: list[Metric]
    grids: list[Grid]
    papers: list[Paper]


# ---- Markdown ----


def markdown(parts: Sequence[Part], notes: Sequence[str]) -> str:
    """A heading a section, then its tables and what has to be known to read them."""
    blocks: list[str] = []
    for part in parts:
        blocks.append(f"## {part.section.title}")
        for grid in part.grids:
            blocks += [f"### {grid.title}", "\n".join(table_lines(_markdown_rows(grid)))]
            blocks += [_plain(note) for note in grid.notes]
        if part.section.notes:
            blocks += ["### Settings that differ", "\n".join(f"- {_plain(note)}" for note in part.section.notes)]
    return "\n\n".join([*blocks, *map(_plain, notes)]) + "\n"


def _plain(note: str) -> str:
    return note.replace("*", "\\*")


def _markdown_rows(grid: Grid) -> list[list[str]]:
    named = [block for block in grid.blocks if block.heading]
    heads = [
        f"{block.heading}: {column}" if block in named[1:] else column
        for block in grid.blocks
        for column in block.columns
    ]
    rows = [["method", *heads]]
    for number, name in enumerate(grid.names):
        cells = [cell for block in grid.blocks for cell in _spread(block, number)]
        rows.append([name, *(_marked(cell, "**", "**", "\\*") for cell in cells)])
    return rows


def _spread(block: Block, number: int) -> list[Cell]:
    """A cell a column: Markdown knows none that spans several."""
    row = block.rows[number]
    return row if len(row) == len(block.columns) else row * len(block.columns)


def _marked(cell: Cell, begin: str, end: str, star: str) -> str:
    return (f"{begin}{cell.text}{end}" if cell.bold else cell.text) + star * cell.star


# ---- LaTeX ----

_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "''",
    "±": "$\\pm$",
}


def escape(text: str) -> str:
    """Plain text as LaTeX shows it; powers of ten and errors as formulas, `names` upright."""
    escaped = "".join(_SPECIAL.get(character, character) for character in text)
    escaped = re.sub(r"(?<![\w$.])-(?=\d)", "$-$", escaped)
    escaped = re.sub(r"\b(\d+\.\d+)e(-?\d+)\b", r"$\1 \\times 10^{\2}$", escaped)
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escaped)


def latex(parts: Sequence[Part], notes: Sequence[str]) -> str:
    """A ``table`` each, captioned; what has to be known as text below the last one of a section."""
    lines = ["% needs \\usepackage{booktabs}"]
    for part in parts:
        for grid in part.grids:
            lines += ["", *_latex_table(part.section.title, grid)]
        lines += [f"\n{escape(note)}" for note in part.section.notes]
    return "\n".join([*lines, *(f"\n{escape(note)}" for note in notes)]) + "\n"


def _latex_table(title: str, grid: Grid) -> list[str]:
    columns = "l" + "".join("c" * len(block.columns) for block in grid.blocks)
    caption = " ".join([f"{title}. {grid.title}.", *grid.notes])
    lines = ["\\begin{table}", "\\centering", f"\\caption{{{escape(caption)}}}", f"\\begin{{tabular}}{{{columns}}}"]
    lines.append("\\toprule")
    if len(grid.blocks) > 1:
        lines += _latex_headings(grid)
    heads = [escape(column) for block in grid.blocks for column in block.columns]
    lines += [" & ".join(["method", *heads]) + " \\\\", "\\midrule"]
    for number, name in enumerate(grid.names):
        cells = []
        for block in grid.blocks:
            row, width = block.rows[number], len(block.columns)
            shown = [_marked(cell._replace(text=escape(cell.text)), "\\textbf{", "}", "*") for cell in row]
            cells += [f"\\multicolumn{{{width}}}{{c}}{{{shown[0]}}}"] if len(row) < width else shown
        lines.append(" & ".join([escape(name), *cells]) + " \\\\")
    return [*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]


def _latex_headings(grid: Grid) -> list[str]:
    cells, rules, first = [""], [], 2
    for block in grid.blocks:
        width = len(block.columns)
        cells.append(f"\\multicolumn{{{width}}}{{c}}{{{escape(block.heading)}}}")
        rules.append(f"\\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    return [" & ".join(cells) + " \\\\", " ".join(rules)]


# ---- CSV ----

CSV_HEAD = [
    *("source", "section", "metric", "method", "settings", "sparsity", "n", "mean", "standard_error", "best", "seeds"),
    *("average_density", "density", "flops", "flops_relative", "seconds"),
]
_MEANS = ("average_density", "density", "flops", "flops_relative", "seconds")


def table_csv(parts: Sequence[Part]) -> str:
    """A row for each method, sparsity and metric; empty where there is no figure, as the error of one seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for part in parts:
        for metric in part.metrics:
            writer.writerows(_run_lines(part.section, metric))
            for paper in part.papers:
                if paper.metric == metric.name:
                    writer.writerows(_paper_lines(part.section, paper))
    return stream.getvalue()


def _run_lines(section: Section, metric: Metric) -> list[list[object]]:
    best, lines = winners(section, metric), []
    for row in section.rows:
        settings = row.name.removeprefix(row.preset).strip(" ()")
        for sparsity, runs in sorted(row.cells.items()):
            value = value_of(runs, metric.name)
            if value is None:
                continue
            measured = [run for run in runs if run.figure(metric.name) is not None]
            means = [value_of(measured, key) for key in _MEANS]
            seeds = " ".join(dict.fromkeys(str(run.settings["seed"]) for run in measured))
            about = ["runs", section.title, metric.name, row.preset, settings, sparsity]
            figures = [value.seeds, value.mean, value.error, (row.name, sparsity) in best, seeds]
            lines.append([*about, *figures, *(mean.mean if mean else None for mean in means)])
    return lines


def _paper_lines(section: Section, paper: Paper) -> list[list[object]]:
    lines: list[list[object]] = []
    for method in dict.fromkeys(row.preset for row in section.rows):
        for sparsity in [0.0] if method == DENSE else [one for one in paper.sparsities if one in section.sparsities]:
            value = paper.value(method, sparsity)
            if value is not None:
                about = [paper.source, section.title, paper.metric, method, None, sparsity]
                lines.append([*about, None, value.mean, value.error, *[None] * (len(CSV_HEAD) - 9)])
    return lines
