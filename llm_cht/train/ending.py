"""The end of a run: which weights become its model, and the summary.

The model is written from checkpoints, not from live ranks (see ``export.py``), so the best one, or the mean of the last
ones, costs no memory of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llm_cht import dist
from llm_cht.train.build import Built
from llm_cht.train.checkpoint import Checkpoint, CheckpointStore
from llm_cht.train.config import exported
from llm_cht.train.export import same_topology, write_model
from llm_cht.train.shared import see


def write_final_model(built: Built, store: CheckpointStore, latest: Path, folder: Path) -> list[int]:
    """Write the model of a run that has saved its last checkpoint; returns the steps it is made of. A collective.

    Raises:
        UserError: a checkpoint is damaged, or the folder cannot be written.
    """
    settings, newest = built.settings.checkpoint, store.load(latest)
    chosen: list[Checkpoint] = [newest]
    match exported(built.settings):
        case "best":
            with dist.together():
                found = store.best() if dist.is_main() else None
            best = dist.from_main(str(found or latest))
            chosen = [newest if Path(best) == latest else store.load(Path(best))]
        case "average":
            with dist.together():
                folders = store.folders() if dist.is_main() else []
            paths = [Path(path) for path in dist.from_main([str(path) for path in folders]) if Path(path) != latest]
            every = settings.every  # a checkpoint beside the regular ones was saved for a signal, or as the best
            regular = [one for one in map(store.load, paths) if every and one.step % every == 0]
            chosen = [*(one for one in regular if same_topology(one, newest)), newest][-settings.average :]
    with dist.together(patient=True):
        if dist.is_main():
            write_model(chosen, built.task.tokenizer, folder, getattr(torch, settings.export_dtype))
    with dist.together(patient=True):
        see(folder / "config.json")
    return [checkpoint.step for checkpoint in chosen]


def summary(
    built: Built,
    density: float,
    steps: list[int],
    folder: Path,
    watched: Callable[[Iterable[Any]], Iterator[Any]],
) -> dict[str, Any]:
    """Figures of a finished run; ``steps`` are those of its model, in ``folder``. A collective."""
    progress, updater = built.parts.progress, built.updater
    loss = progress.last_validation["loss"]
    return {
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        **built.task.conclude(folder, watched),
        "model_of_steps": steps,
        "density": density,
        "average_density": progress.density_sum / progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "flops_per_token": progress.flops / progress.tokens,
        "flops_relative": progress.flops / progress.dense_flops,
        **(updater.memory() if updater else {}),
        "skipped": progress.skipped,
    }
