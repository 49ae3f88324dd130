"""Folders and files that appear whole or not at all, for checkpoints, models and records alike.

They are written under a hidden name beside their place, forced to disk and renamed, so that a reader finds the old one
or the new one, never half of one. Rejected: ``renameat2(RENAME_EXCHANGE)``, which is Linux only; ``settle`` closes the
same gap.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_cht.errors import UserError


def absolute(path: str) -> str:
    """``path`` from the root, so that it means the same from any working directory; an empty one stays empty."""
    return os.path.abspath(os.path.expanduser(path)) if path else path


def is_path(name: str) -> bool:
    """Whether ``name`` can only be a file or folder here: no `name` or `owner/name` of the Hugging Face hub."""
    return name.endswith((".yaml", ".yml", ".json")) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)


def _hidden(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def settle(target: Path) -> None:
    """Put right what a killed ``new_folder`` or ``discard`` of ``target`` left behind; touches only their own names."""
    old = _hidden(target, "old")
    if old.exists() and not target.exists():  # killed between the two renames
        old.rename(target)
    for role in ("new", "old", "trash"):
        shutil.rmtree(_hidden(target, role), ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_folder(target: Path) -> Path:
    """Make the hidden folder that ``finish_folder`` puts in the place of ``target``, and ``settle`` removes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    fresh = unfinished(target)
    fresh.mkdir()
    return fresh


def unfinished(target: Path) -> Path:
    """Where ``begin_folder`` makes its folder."""
    return _hidden(target, "new")


def finish_folder(target: Path) -> None:
    """Put the folder of ``begin_folder``, whose files are on disk, in the place of ``target``; then ``settle``."""
    fresh = unfinished(target)
    sync(fresh)
    if target.exists():
        target.rename(_hidden(target, "old"))
    fresh.rename(target)
    sync(target.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder to fill; if the block ends well it is forced to disk and takes the place of ``target``.

    If the block fails, the hidden folder is removed and ``target`` is as it was. One writer at a time.
    """
    try:
        fresh = begin_folder(target)
        yield fresh
        umask = os.umask(0)
        os.umask(umask)
        for path in fresh.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors leaves its files to their owner alone
            sync(path)
        finish_folder(target)
    finally:
        settle(target)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or not there; until then ``path`` is as it was."""
    fresh = _hidden(path, "new")
    try:
        fresh.write_text(text, encoding="utf-8")
        sync(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder such that a kill never leaves half of it under its own name."""
    trash = _hidden(folder, "trash")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(target: Path, needed: int, kept: str) -> Iterator[None]:
    """Turn a failed write below ``target`` into a ``UserError``.

    ``needed`` is the size in bytes, ``kept`` the sentence that tells the user what is not lost. safetensors and
    tokenizers raise exceptions of their own for a failed write; both end in the system's "(os error N)".
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in _NO_ROOM:
            raise UserError(
                f"cannot write {target}: {error}. {kept} Make the folder writable, then start again."
            ) from error
        place = next(path for path in target.absolute().parents if os.path.isdir(path))
        free = shutil.disk_usage(place).free
        raise UserError(
            f"cannot write {target}: {error}. It takes {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free there. "
            f"{kept} Free space, then start again."
        ) from error
