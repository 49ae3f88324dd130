"""Finished runs side by side as a Markdown table: per method the best learning rate, its mean and spread over seeds.

    python eval/table.py runs/wikitext2/*

Runs are grouped by preset and sparsity. The learning rate of a group is the one with the lowest mean perplexity over
its seeds; the other rates stand in the second table, so that a reader sees how flat the optimum is.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from llm_cht.errors import UserError
from llm_cht.train.metrics import FILE_NAME, read_metrics


def read_run(folder: Path) -> dict[str, Any]:
    """Settings and summary of one run."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml")
    end = [record for record in read_metrics(folder / FILE_NAME) if record["kind"] == "end"]
    if not end:
        raise UserError(f"{folder} has not run to its end; go on with: llm-cht train {config} --resume auto")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    method = settings["method"]
    sparsity = 0.0 if method["preset"] == "dense" else method["sparsity"]
    key = {
        "preset": method["preset"],
        "sparsity": sparsity,
        "lr": settings["optimizer"]["lr"],
        "seed": settings["seed"],
    }
    return key | end[-1]["summary"]


def table(runs: list[dict[str, Any]]) -> str:
    """Both tables as Markdown."""
    groups: dict[tuple[str, float], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run["preset"], run["sparsity"]][run["lr"]].append(run)
    lines = [
        "| method | sparsity | lr | seeds | perplexity | lowest | highest | average density | seconds a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    other = ["", "| method | sparsity | lr | seed | perplexity |", "| --- | --- | --- | --- | --- |"]
    for (preset, sparsity), by_lr in groups.items():
        most = max(len(of_lr) for of_lr in by_lr.values())
        complete = {lr: of_lr for lr, of_lr in by_lr.items() if len(of_lr) == most}
        best = min(complete, key=lambda lr: mean(complete[lr], "perplexity"))
        chosen = complete[best]
        values = [run["perplexity"] for run in chosen]
        lines.append(
            f"| {preset} | {sparsity} | {best:g} | {len(values)} | {statistics.fmean(values):.2f} | {min(values):.2f} "
            f"| {max(values):.2f} | {mean(chosen, 'average_density'):.3f} | {mean(chosen, 'seconds'):.0f} |"
        )
        for lr, of_lr in sorted(by_lr.items()):
            for run in sorted(of_lr, key=lambda run: run["seed"]):
                other.append(f"| {preset} | {sparsity} | {lr:g} | {run['seed']} | {run['perplexity']:.2f} |")
    return "\n".join(lines + other)


def mean(runs: list[dict[str, Any]], figure: str) -> float:
    """Mean of one figure of the summaries."""
    return statistics.fmean(run[figure] for run in runs)


def main() -> int:
    """Print the tables of the run folders on the command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    try:
        print(table([read_run(Path(folder)) for folder in sys.argv[1:]]))
    except UserError as error:
        print(f"table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
