"""The cache of prepared data: folders that are whole or not there.

A folder is built under another name and renamed at the end, under a lock: a killed preparation leaves nothing that is
believed later, and several processes that need the same folder build it once. The cache of ``Dataset.map`` was not
enough: its key is a pickle of the code, and it keeps one file per step instead of one folder per set of settings.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from llm_cht.errors import UserError


def cache_root(setting: str | None) -> Path:
    """The setting, else $LLM_CHT_CACHE, else llm_cht in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(setting or os.environ.get("LLM_CHT_CACHE") or f"{user}/llm_cht").expanduser()


def built(folder: Path, make: Callable[[Path], None], setting: str = "data.cache_dir") -> Path:
    """``folder``, made by ``make(path)`` under another name if it is not there yet; ``setting`` names the cache.

    Raises:
        UserError: the cache cannot be written (permission, disk full).
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was killed
                partial.mkdir()
                try:
                    make(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the data cache {folder.parent} cannot be written: {error.strerror or error}; free space there, or set "
            f"`{setting}` or LLM_CHT_CACHE to another folder"
        ) from error
    return folder
