"""A run from its settings to its end: checks, start of the engine, build or resume, the loop.

On many ranks whatever may fail on one of them alone is done together: all go on, or all raise the same ``UserError``.
From the moment they have found each other a watchdog ends all ranks when one is lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from llm_cht import config, dist
from llm_cht.errors import UserError
from llm_cht.train.build import build
from llm_cht.train.checkpoint import Checkpoint
from llm_cht.train.config import RunSettings, check, resolved
from llm_cht.train.engine import Engine, EngineSettings, start_engine
from llm_cht.train.environment import check_same
from llm_cht.train.loop import Loop, Outcome, resume_command
from llm_cht.train.metrics import MetricsLog
from llm_cht.train.random_state import seed_rank
from llm_cht.train.rundir import claimed, find_run, write_config
from llm_cht.train.shared import check_shared
from llm_cht.train.signals import StopSignals
from llm_cht.train.state import restore
from llm_cht.train.watchdog import Watchdog


def train(settings: RunSettings, say: Callable[[str], None] = print) -> Outcome:
    """Train as ``settings`` ask, into ``settings.run``. On many ranks every one calls it.

    Raises:
        UserError: a mistake in the settings, files or environment; a loss that is not finite.
    """
    check(settings)
    settings = resolved(_resumed_by_launcher(settings))
    engine = start_engine(_engine_settings(settings))
    with Watchdog(settings.train.timeout_s, resume_command(Path(settings.run)), say) as watchdog:
        outcome = _train(settings, engine, watchdog, say if dist.is_main() else _silent)
    dist.close()
    return outcome


def _train(settings: RunSettings, engine: Engine, watchdog: Watchdog, say: Callable[[str], None]) -> Outcome:
    check_same(config.flat(yaml.safe_load(config.dump(settings))))
    check_shared(Path(settings.run))
    run, checkpoint = find_run(settings, say)
    built = build(settings, engine, checkpoint is None, say)
    if checkpoint is not None:
        with dist.together():
            _check_data(checkpoint.state["data_fingerprint"], built.task.fingerprint, str(checkpoint.path))
            restore(built.parts, checkpoint, settings.seed)
        say(f"resumed from {checkpoint.path}")
        if built.parts.progress.best is not None and _measures_otherwise(checkpoint.state["settings"], settings):
            built.parts.progress.best = None
            say("note: `validation` has changed, so that the best checkpoint is looked for anew from here on")
    else:
        seed_rank(settings.seed, 0)
    with ExitStack() as stack:
        with dist.together():
            if dist.is_main():
                stack.enter_context(claimed(settings, checkpoint))
                write_config(run, settings)
        # until here a signal ends the program as usual: nothing is half done
        signals = stack.enter_context(StopSignals(launched=dist.world_size() > 1))
        log = stack.enter_context(_opened_log(run, settings, checkpoint))
        loop = Loop(built, run, log, signals, watchdog, say)
        if checkpoint is None:
            loop.begin()
        outcome = loop.run_to_end()
        dist.gather(None, patient=True)  # nobody leaves while another still needs it
    return outcome


def _resumed_by_launcher(settings: RunSettings) -> RunSettings:
    """Restarted by an elastic launcher (``accelerate launch --max_restarts``) a run goes on where it was."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return replace(settings, resume="auto") if restarted and settings.resume is None else settings


def _engine_settings(settings: RunSettings) -> EngineSettings:
    train = settings.train
    by_tokens = settings.task == "translation"
    return EngineSettings(
        train.device,
        train.precision,
        train.batch_tokens if by_tokens and train.batch_tokens else train.batch_size,
        train.micro_batch_tokens if by_tokens else train.micro_batch_size,
        train.clip_norm,
        train.timeout_s,
        train.on_nonfinite == "skip",
        by_tokens,
    )


@contextmanager
def _opened_log(run: Path, settings: RunSettings, checkpoint: Checkpoint | None) -> Iterator[MetricsLog | None]:
    """The log of the main rank, cut back to where the run goes on; None on the others."""
    log = None
    with dist.together():
        if dist.is_main():
            log = MetricsLog(run, settings.metrics, config=yaml.safe_load(config.dump(settings)))
            if checkpoint is None:
                log.truncate_after(-1)
            else:
                complete = checkpoint.step == settings.train.steps  # then only its ending is done again
                log.truncate_after(checkpoint.step, again=("end", "validation") if complete else ("end",))
    try:
        yield log
    finally:
        if log is not None:
            log.close()


def _silent(text: str) -> None:
    """What the ranks besides the main one say."""


def _measures_otherwise(saved: dict[str, Any], settings: RunSettings) -> bool:
    """Whether figures of validations cannot be compared with those of the run as it was ``saved``."""
    old, new = config.flat(saved), config.flat(yaml.safe_load(config.dump(settings)))
    computed = ("validation.every", "validation.batch_size")
    keys = {key for key in old.keys() & new.keys() if key.startswith("validation.") and key not in computed}
    return any(old[key] != new[key] for key in keys)


def _check_data(saved: str, now: str, place: str) -> None:
    if saved != now:
        raise UserError(
            f"the data differ from those of {place} (fingerprint {now[:12]} now, {saved[:12]} then): a file, the "
            "tokenizer or the standard library changed; restore them, or start another run with `--run`"
        )
