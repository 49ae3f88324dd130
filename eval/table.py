"""Runs and evaluations as the tables of the papers: methods x sparsities, mean and standard error over seeds.

    python eval/table.py RUN_OR_FOLDER ... [--metric NAME ...] [--eval FILE ...] [--paper NAME ...] [--output FILE ...]

A folder stands for all runs below it, such as a sweep's; what has not finished is named and left out. For each model
and data set there is a table of the metric that the task has, or of those asked for, then one of the density and one of
the training FLOPs. Only seeds are averaged: where runs of one method and sparsity differ in another setting, each of
its values is a row; ``--best KEY`` takes of each cell the value with the best validation figure instead, ``--ignore
KEY`` averages over it, within each seed first, so that the error stays that over seeds. The modules ``table_*.py`` say
the rest.

``--eval`` adds what ``zero_shot.py``, ``perplexity.py`` and ``bleu.py`` wrote with ``--json`` for RUN/model: ``mcc``,
``accuracy``, ``mcc.TASK``, ``eval_perplexity``, ``eval_bleu``, ... ``--paper`` puts printed figures beside, which
``--papers`` lists. They belong to the papers' models and data, so none is shown unless asked for by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its neighbours however llm_cht is installed

from eval import command_line
from eval.table_collect import find_runs, percent, read_run
from eval.table_grid import find_papers, grids_of, load_papers
from eval.table_metrics import add_evaluations, check_wanted, choose, metric_of
from eval.table_plot import plot
from eval.table_sections import sections_of
from eval.table_write import Part, latex, markdown, table_csv
from llm_cht.errors import UserError
from llm_cht.files import disk_errors, write_whole

_FORMATS = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the tables; returns the exit code: 0, or 2 for a mistake of the user."""
    return command_line.run("table.py", lambda: _tabulate(arguments))


def _tabulate(arguments: Sequence[str] | None) -> None:
    options = _options(arguments)
    if options.papers:
        _list_papers()
        return
    folders = find_runs(options.runs)
    read = {folder: read_run(folder) for folder in folders}
    runs = [run for run in read.values() if run is not None]
    unfinished = [str(folder) for folder, run in read.items() if run is None]
    if not runs:
        raise UserError(
            f"no run has finished: {', '.join(unfinished)}; go on with: "
            f"llm-cht train {unfinished[0]}/config.yaml --resume auto"
        )
    notes = [f"Left out, for they have not finished: {', '.join(unfinished)}."] if unfinished else []
    notes += add_evaluations(runs, options.eval)
    check_wanted(options.metric, runs)
    sections = sections_of(runs, options.ignore, options.best)
    shown = [(section, choose(options.metric, section.runs, section.task)) for section in sections]
    shown = [(section, metrics) for section, metrics in shown if metrics]
    papers = find_papers(options.paper, shown)
    parts = [Part(section, metrics, grids_of(section, metrics, papers), papers) for section, metrics in shown]
    if not parts:
        raise UserError("the runs have no figure that a table shows; their metrics.jsonl is of another program")
    _tell(parts, notes, options)


def _tell(parts: Sequence[Part], notes: Sequence[str], options: argparse.Namespace) -> None:
    render = {
        "markdown": lambda: markdown(parts, notes),
        "latex": lambda: latex(parts, notes),
        "csv": lambda: table_csv(parts),
    }
    if options.plot:
        plot(parts, options.plot)
    for path in options.output:
        text = render[_FORMATS[path.suffix]]()
        with disk_errors(path, len(text), "The runs are untouched."):
            write_whole(path, text)
    shown = options.format or ([] if options.output or options.plot else ["markdown"])
    print("\n".join(render[name]() for name in shown), end="")
    if shown in ([], ["csv"]):
        for note in notes:
            print(note, file=sys.stderr)


def _list_papers() -> None:
    width = max(map(len, load_papers()))
    for paper in load_papers().values():
        columns = ", ".join(map(percent, paper.sparsities))
        print(f"{paper.name.ljust(width)}  {paper.source}: {metric_of(paper.metric).title} at {columns}; {paper.about}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(prog="table.py", description="Tables of runs: methods x sparsities, over seeds.")
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, or folders that hold runs")
    add("--metric", nargs="+", default=[], metavar="NAME", help="figures to show; patterns too (default: the task's)")
    add("--eval", nargs="+", type=Path, default=[], metavar="FILE", help="what the other programs wrote with --json")
    add("--paper", nargs="+", default=[], metavar="NAME", help="printed figures to put beside")
    add("--papers", action="store_true", help="list the printed figures there are")
    add("--best", nargs="+", default=[], metavar="KEY", help="of this setting, the value with the best validation")
    add("--ignore", nargs="+", default=[], metavar="KEY", help="settings that may differ within a cell")
    add("--format", nargs="+", default=[], choices=[*_FORMATS.values()], help="what to print (markdown)")
    add("--output", nargs="+", type=Path, default=[], metavar="FILE", help="write FILE.md, FILE.tex or FILE.csv")
    add("--plot", type=Path, metavar="FILE", help="draw FILE.svg, FILE.png or FILE.pdf")
    options = parser.parse_args(arguments)
    if not options.runs and not options.papers:
        raise UserError("give the folder of a run, or one that holds runs, before the options (--help lists them)")
    for path in options.output:
        _check_file("--output", path, tuple(_FORMATS))
    if options.plot:
        _check_file("--plot", options.plot, (".svg", ".png", ".pdf"))
    return options


def _check_file(option: str, path: Path, endings: tuple[str, ...]) -> None:
    if path.suffix not in endings:
        raise UserError(f"{option} {path}: give a name that ends with {', '.join(endings[:-1])} or {endings[-1]}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.absolute().parent}; make it, or correct the path")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give the name of a file")


if __name__ == "__main__":
    sys.exit(main())
