"""The runs of a table: found below folders and read, finished or not, and what each is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_cht import config
from llm_cht.errors import UserError
from llm_cht.train.metrics import FILE_NAME, read_metrics
from llm_cht.train.rundir import CONFIG_NAME

DENSE = "dense"

Settings = dict[str, Any]


@dataclass
class Run:
    """One finished run."""

    folder: Path
    settings: Settings
    """by dotted name; a table of a method (``method.regrowth_from``) is one value"""
    summary: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    """of evaluations, by metric"""
    measured: dict[str, str] = field(default_factory=dict)
    """by metric of evaluations: how"""

    @property
    def task(self) -> str:
        """language_modelling or translation."""
        return self.settings.get("task", "language_modelling")

    @property
    def preset(self) -> str:
        """Its method."""
        return self.settings["method.preset"]

    @property
    def sparsity(self) -> float:
        """Share of missing links that was asked for."""
        return 0.0 if self.preset == DENSE else round(float(self.settings["method.sparsity"]), 6)

    def figure(self, metric: str) -> float | None:
        """A figure of an evaluation or of the summary; None if there is none, or it is not finite."""
        value = self.figures.get(metric, self.summary.get(metric))
        return value if value is not None and math.isfinite(value) else None

    def has(self, metric: str) -> bool:
        """Whether there is such a figure, finite or not."""
        return metric in self.figures or metric in self.summary


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The folders of runs that are or lie below ``places``, each once.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    found: dict[Path, Path] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"RUN {place}: no such folder (looked from {Path.cwd()}); correct the path")
        here = _below(place)
        if not here:
            raise UserError(f"RUN {place}: neither a run nor a folder of runs; give folders with a {CONFIG_NAME}")
        found |= {folder.resolve(): folder for folder in here if folder.resolve() not in found}
    return list(found.values())


def _below(place: Path) -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(place):
        if CONFIG_NAME in files and (FILE_NAME in files or _is_begun(Path(folder))):
            found.append(Path(folder))
            subfolders.clear()
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return found


def _is_begun(folder: Path) -> bool:
    """Whether the config of a folder without metrics is that of a run there, and not one to start runs with."""
    try:
        run = config.load_yaml(folder / CONFIG_NAME).get("run")
    except UserError:
        return False
    return isinstance(run, str) and Path(run).resolve() == folder.resolve()


def read_run(folder: Path) -> Run | None:
    """A run, or None if it has not finished.

    Raises:
        UserError: its config or its metrics are damaged.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    ends = [record for record in read_metrics(folder / FILE_NAME) if record["kind"] == "end"]
    values = config.load_yaml(folder / CONFIG_NAME)
    method = values.pop("method", None)
    settings = config.flat(values)
    if isinstance(method, dict):
        settings |= {f"method.{key}": value for key, value in method.items()}
    for key in ("method.preset", "method.sparsity", "seed"):
        if key not in settings:
            raise UserError(f"{folder / CONFIG_NAME} lacks `{key}`: it is not the one that a run writes; restore that")
    return Run(folder, settings, ends[-1]["summary"]) if ends else None


def percent(sparsity: float) -> str:
    """A fraction as tables show it."""
    return f"{100 * sparsity:.6g} %"
