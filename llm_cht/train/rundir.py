"""The folder of a run: who may write into it, and whether a resume is a resume of the same run."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from llm_cht import config, dist
from llm_cht.errors import UserError
from llm_cht.files import disk_errors, write_whole
from llm_cht.train.checkpoint import Checkpoint, resolve
from llm_cht.train.config import RunSettings

CONFIG_NAME = "config.yaml"

_MAY_CHANGE = {
    "run",
    "resume",
    "train.device",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.compile",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.timeout_s",
    "data.source",
    "data.validation",
    "data.tokenizer",
    "data.cache_dir",
    "pairs.train",
    "pairs.validation",
    "pairs.test",
    "pairs.vocabulary",
    "pairs.cache_dir",
    "method.workspace_mb",
    "method.initial_path",
    "method.force",
}
_SECTIONS_MAY_CHANGE = ("metrics.", "checkpoint.", "validation.")
"""What a resumed run may change: how it is computed or watched, not what it is. The data's fingerprint is compared, so
that they may lie elsewhere."""


def find_run(settings: RunSettings, say: Callable[[str], None]) -> tuple[Path, Checkpoint | None]:
    """The run folder and the checkpoint to go on from; nothing is written.

    Raises:
        UserError: the folder holds another run, or the checkpoint is of a run with other settings.
    """
    run = Path(settings.run)
    with dist.together():
        present = _present(run)
        if CONFIG_NAME in present and settings.resume is None:
            raise UserError(
                f"{run} holds a run already; go on with it by `--resume auto`, or give another folder with `--run`"
            )
        if present and CONFIG_NAME not in present:
            raise UserError(f"{run} is not empty and holds no run; give an empty or new folder with `--run`")
    checkpoint = resolve(settings.resume, run / "checkpoints", say)
    with dist.together():
        if checkpoint is not None:
            home = checkpoint.path.parent.parent
            if home.resolve() != run.resolve():
                raise UserError(
                    f"`resume` {checkpoint.path} belongs to the run {home}, not to {run}; give `--run {home}`"
                )
            _check_same(checkpoint.state["settings"], settings, str(checkpoint.path))
        if CONFIG_NAME in present:  # with a checkpoint of elsewhere too: the run that is here must not be overwritten
            _check_same(config.load_yaml(run / CONFIG_NAME), settings, str(run / CONFIG_NAME))
    if settings.resume is not None and checkpoint is None:
        say(f"{run} has no checkpoint to resume from: the run starts from step 0")
    return run, checkpoint


def _present(run: Path) -> list[str]:
    try:
        return [name for name in os.listdir(run) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"`run` {run}: {error.strerror}; give a folder you may write to with `--run`") from error


@contextmanager
def claimed(settings: RunSettings, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Keep other processes from training in the run folder; it is made if it is not there. For the main rank only.

    ``checkpoint`` is what ``find_run`` gave. The lock is the operating system's: it ends with the process, however that
    ends.

    Raises:
        UserError: another process trains there, or did since ``find_run``, or the folder cannot be written.
    """
    run = Path(settings.run)
    taken = (
        f"another process is training in this run folder, {run}; wait until it ends or stop it, or give another folder "
        "with `--run`"
    )
    with locked(run, taken, "Nothing was written; `--run` gives another folder."):
        begun = settings.resume is None and (run / CONFIG_NAME).exists()
        if begun or (checkpoint is None and any((run / "checkpoints").glob("step-*"))):
            raise UserError(f"another process has trained in {run} meanwhile; go on with its run by `--resume auto`")
        yield


@contextmanager
def locked(folder: Path, taken: str, kept: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there; it ends with the process, however that ends.

    Raises:
        UserError: another process holds it (the message is ``taken``), or the folder cannot be written (``kept`` says
            what is not lost).
    """
    file = folder / ".lock"
    lock = FileLock(file, timeout=0)
    with disk_errors(folder, 0, kept):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(taken) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is locked: who waits for it sees that it is gone, and makes a new one
        lock.release()


def write_config(run: Path, settings: RunSettings) -> None:
    """Make the run folder and write the resolved settings into it, all at once; how it was resumed is not one of them.

    Raises:
        UserError: the folder cannot be written.
    """
    text = config.dump(replace(settings, resume=None))
    with disk_errors(run / CONFIG_NAME, len(text), "Nothing was written; `--run` gives another folder."):
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / CONFIG_NAME, text)


def changed(saved: dict[str, Any], settings: RunSettings, keep: Collection[str] = ()) -> str | None:
    """What makes ``settings`` another run than the ``saved`` ones, as "`key` is ... now and was ..."; None if nothing.

    ``keep`` names settings that a resumed run may change but the caller does not allow to.
    """
    old, new = config.flat(saved), config.flat(yaml.safe_load(config.dump(settings)))
    # the length first: others follow from it, which the user never set
    for key in {"train.steps": None, **old, **new}:
        free = (key in _MAY_CHANGE or key.startswith(_SECTIONS_MAY_CHANGE)) and key not in keep
        if old.get(key) != new.get(key) and not free:
            return f"`{key}` is {new.get(key)!r} now and was {old.get(key)!r}"
    return None


def _check_same(saved: dict[str, Any], settings: RunSettings, place: str) -> None:
    change = changed(saved, settings)
    if change is not None:
        raise UserError(
            f"{change} in {place}; a resumed run keeps it: resume with RUN/config.yaml and leave that setting out, or "
            "start another run with `--run`"
        )
