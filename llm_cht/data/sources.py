"""Where documents come from: the Python standard library, local files, a data set of the hub.

A source is a list of shards, each an ordered list of documents that can be entered at any number; this is all that
preparation and streaming need, and the same for all places. Its ``content`` goes into the cache key, so that changed
data are prepared again. File times were rejected for the key: a copied file would be prepared twice, and a resume on
another machine refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llm_cht.data.readers import COMPRESSED, JSON_LINES, KNOWN, PARQUET, TEXT, Rule, kind, read_documents
from llm_cht.data.settings import DataSettings
from llm_cht.errors import UserError
from llm_cht.files import absolute

_SAMPLE_BYTES = 2**20
_NOT_TEXT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Source(Protocol):
    """Documents in shards."""

    @property
    def place(self) -> str:
        """How messages call it."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""

    def content(self, sampled: bool) -> str:
        """A digest of the documents; ``sampled``: without reading them all."""

    def documents(self, shard: int, start: int = 0) -> Iterator[str]:
        """Documents of one shard in order, from number ``start`` on."""


@dataclass(frozen=True)
class FileSource:
    """Local files, one shard each."""

    place: str
    files: tuple[Path, ...]
    text_field: str
    rule: Rule | None

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def content(self, sampled: bool) -> str:
        """Digest of formats and bytes of all files in order; ``sampled``: of each file's size and first MiB."""
        files = [[path.suffix, kind(path), file_digest(path, sampled)] for path in self.files]
        return digest_of([self.text_field, self.rule, files])

    def documents(self, shard: int, start: int = 0) -> Iterator[str]:
        """Documents of file number ``shard``."""
        return read_documents(self.files[shard], self.text_field, self.rule, start)


def builtin() -> FileSource:
    """The modules of the running Python's standard library, without tests: one document a file, in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        if not _NOT_TEXT_OF_THE_LIBRARY & set(path.relative_to(root).parts[:-1]) and path.stat().st_size
    ]
    if not files:
        raise UserError(f"`data.source` = 'builtin': no `.py` files in {root}; give files of your own")
    return FileSource("`data.source` = builtin", tuple(files), "text", "file")


def local_files(place: str, names: list[str], text_field: str, rule: Rule | None) -> FileSource:
    """The files that ``names`` (files, folders, globs) stand for, in order of name and path.

    Raises:
        UserError: a name that matches nothing, a folder without data files, an unknown extension.
    """
    files: list[Path] = []
    for name in names:
        files += _matches(f"`{place}` = {name!r}", name)
    some = ", ".join(names if len(names) <= 3 else [*names[:3], "..."])
    return FileSource(f"`{place}` = {some}", tuple(dict.fromkeys(files)), text_field, rule)


def is_local(name: str) -> bool:
    """Whether ``name`` means files here; otherwise it is the name of a data set of the hub (`name` or `owner/name`)."""
    looks_local = name.startswith((".", "/", "~")) or glob.has_magic(name) or name.count("/") > 1
    known = Path(name).suffix in TEXT + JSON_LINES + PARQUET + COMPRESSED
    return looks_local or known or Path(name).exists()


def on_hub(source: str | list[str]) -> bool:
    """Whether `data.source` is a data set of the hub."""
    names = names_of(source)
    return names != ["builtin"] and len(names) == 1 and not is_local(names[0])


def names_of(setting: str | list[str] | None) -> list[str]:
    """The names in `data.source` or `data.validation`."""
    if setting is None:
        return []
    return [setting] if isinstance(setting, str) else setting


def with_absolute_paths(settings: DataSettings) -> DataSettings:
    """``settings`` whose names of local files mean the same from any working directory."""
    source, validation = settings.source, settings.validation
    if not on_hub(source):
        source = source if names_of(source) == ["builtin"] else _absolute(source)
        validation = None if validation is None else _absolute(validation)
    tokenizer, cache = settings.tokenizer, settings.cache_dir
    if tokenizer is not None and tokenizer != "bpe" and Path(tokenizer).expanduser().exists():
        tokenizer = absolute(tokenizer)
    cache = None if cache is None else absolute(cache)
    return replace(settings, source=source, validation=validation, tokenizer=tokenizer, cache_dir=cache)


def _absolute(setting: str | list[str]) -> str | list[str]:
    return absolute(setting) if isinstance(setting, str) else [absolute(name) for name in setting]


def digest_of(value: Any) -> str:
    """A short digest of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _matches(place: str, name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and kind(file))
        if not found:
            raise UserError(f"{place}: the folder holds no data files; known are {KNOWN}")
        return found
    found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        what = "the pattern matches no file" if glob.has_magic(name) else "no such file or folder"
        raise UserError(f"{place}: {what} (looked from {Path.cwd()}); correct the path")
    for file in found:
        if not kind(file):
            raise UserError(f"{place}: {file}: the extension says no known format; known are {KNOWN}")
    return found


def file_digest(path: Path, sampled: bool = False) -> str:
    """Digest of the bytes of a file; ``sampled``: of its size and first MiB.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not sampled:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            start = hashlib.blake2b(file.read(_SAMPLE_BYTES), digest_size=16).hexdigest()
            return f"{os.fstat(file.fileno()).st_size} {start}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions") from error
