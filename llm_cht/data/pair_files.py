"""Sentence pairs of files and of data sets of the hub, in order, each with the place messages call it by.

Aligned files, records (tab-separated or JSON lines), archives that hold either, and hub data sets are all a list of
pairs that can be read again from the start: preparation reads twice (vocabulary, then tokens) instead of keeping
millions of sentences in memory. Pairs of unequal files are refused, never cut to the shorter: one missing line shifts
every pair after it. Tab-separated files are split at tabs, without quoting: quotation marks are text here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from llm_cht.data.hub import load_split, reach, reading_rows
from llm_cht.data.pair_settings import PairSettings
from llm_cht.data.readers import COMPRESSED, JSON_LINES, as_text, decoded, json_records, missing_field, opened, reading
from llm_cht.data.sources import digest_of, file_digest
from llm_cht.errors import UserError
from llm_cht.files import absolute, is_path

Pair = tuple[str, str]

_TABBED = (".tsv", ".txt")
_RECORDS = _TABBED + JSON_LINES
_FIELD_SETTINGS = "pairs.source` and `pairs.target"


class PairSource(Protocol):
    """Sentence pairs."""

    @property
    def place(self) -> str:
        """How messages call it."""

    def content(self) -> str:
        """A digest of the pairs."""

    def pairs(self) -> Iterator[tuple[int, Pair]]:
        """Number and sentences of each pair, in order."""

    def where(self, number: int, side: int) -> str:
        """How messages call one side (0 or 1) of a pair."""


@dataclass(frozen=True)
class _Text:
    """A text file, or one in an archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}, {self.member}"

    @property
    def format(self) -> str:
        """`.tsv`, `.jsonl`, ...: the extension below any compression."""
        return _extension(self.member or self.path.name)

    def lines(self) -> Iterator[str]:
        """Its lines, with their ends."""
        with reading(self.path), contextlib.ExitStack() as stack:
            if self.member is None:
                file = stack.enter_context(opened(self.path))
            else:
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                file = cast(BinaryIO, stack.enter_context(_member(archive, self.member, self.path)))
            yield from decoded(file, str(self))


@dataclass(frozen=True)
class AlignedFiles:
    """Two files; line n of one translates line n of the other."""

    texts: tuple[_Text, _Text]

    @property
    def place(self) -> str:
        """Both files."""
        return f"{self.texts[0]} and {self.texts[1]}"

    def content(self) -> str:
        """Digest of the bytes of both files."""
        return digest_of([[file_digest(text.path), text.member, text.path.suffix] for text in self.texts])

    def pairs(self) -> Iterator[tuple[int, Pair]]:
        """Pairs by line number."""
        sources, targets = (text.lines() for text in self.texts)
        for number, (source, target) in enumerate(itertools.zip_longest(sources, targets), 1):
            if source is None or target is None:
                longer, rest = (1, targets) if source is None else (0, sources)
                raise self._unequal(number - 1, longer, number + sum(1 for _ in rest))
            yield number, (source.rstrip("\r\n"), target.rstrip("\r\n"))

    def where(self, number: int, side: int) -> str:
        """The line of one of the files."""
        return f"{self.texts[side]}:{number}"

    def _unequal(self, fewer: int, longer: int, more: int) -> UserError:
        return UserError(
            f"{self.texts[1 - longer]} has {fewer:,} lines and {self.texts[longer]} {more:,}: line {fewer + 1} of the "
            "latter has no partner; line n of one file must translate line n of the other"
        )


@dataclass(frozen=True)
class RecordFile:
    """One file with a pair in each line."""

    text: _Text
    languages: Pair

    @property
    def place(self) -> str:
        """The file."""
        return str(self.text)

    def content(self) -> str:
        """Digest of the file's bytes, its format and the fields."""
        fields = None if self.text.format in _TABBED else self.languages
        return digest_of([file_digest(self.text.path), self.text.member, self.text.format, fields])

    def pairs(self) -> Iterator[tuple[int, Pair]]:
        """Pairs by line number, blank lines of JSON left out."""
        lines = self.text.lines()
        if self.text.format in _TABBED:
            yield from ((number, self._columns(number, line)) for number, line in enumerate(lines, 1))
        else:
            for place, record in json_records(lines, self.place):
                yield int(place.rpartition(":")[2]), fields_of(record, self.languages, place)

    def where(self, number: int, side: int) -> str:
        """The line."""
        return f"{self.text}:{number}"

    def _columns(self, number: int, line: str) -> Pair:
        columns = line.rstrip("\r\n").split("\t")
        if len(columns) < 2:
            if line.strip():
                raise UserError(
                    f"{self.place}:{number}: one column, where source and target should stand with a tab between "
                    "them; correct the line"
                )
            return "", ""
        return columns[0], columns[1]


@dataclass(frozen=True)
class HubPairs:
    """One split of a data set of the hub."""

    name: str
    subset: str | None
    split: str
    languages: Pair
    setting: str

    @property
    def place(self) -> str:
        """Data set and split."""
        return f"hub data set {self.name}, split {self.split}"

    @cached_property
    def _rows(self) -> tuple[Any, str]:
        return load_split(self.name, self.subset, self.split, streaming=False, setting=self.setting)

    def content(self) -> str:
        """Digest of the data set's version, split and fields; nothing is read."""
        return digest_of([self._rows[1], self.languages])

    def pairs(self) -> Iterator[tuple[int, Pair]]:
        """Pairs by row number."""
        with reading_rows(self.place):
            for number, row in enumerate(self._rows[0]):
                yield number, fields_of(row, self.languages, f"{self.place}, row {number}")

    def where(self, number: int, side: int) -> str:
        """The row."""
        return f"{self.place}, row {number}"


def fields_of(record: dict[str, Any], languages: Pair, place: str) -> Pair:
    """The sentences of a record: fields named as the languages, its own or those of its field `translation`.

    Raises:
        UserError: a field is missing or holds no text.
    """
    nested = record.get("translation")
    fields = nested if isinstance(nested, dict) else record
    for language in languages:
        if language not in fields:
            raise missing_field(place, language, fields, _FIELD_SETTINGS)
    source, target = (as_text(fields[language], place, language, _FIELD_SETTINGS) for language in languages)
    return _one_line(source), _one_line(target)


def expanded(name: str, place: str) -> str:
    """``name`` with `~` and `$NAME` replaced.

    Raises:
        UserError: the environment has no such variable.
    """
    for plain, braced in re.findall(r"\$(?:(\w+)|\{(\w+)\})", name):
        variable = plain or braced
        if not os.environ.get(variable):
            raise UserError(f"`{place}` = {name!r}: the environment variable {variable} is not set; set it")
    return os.path.expandvars(os.path.expanduser(name))


def pair_sources(settings: PairSettings) -> dict[str, PairSource]:
    """The sources of `train`, and of `validation` and `test` where they have one.

    Raises:
        UserError: a file or data set that is not there or cannot be what it should.
    """
    assert settings.train is not None
    sources = {"train": _source("pairs.train", settings.train, settings)}
    for split in ("validation", "test"):
        name = getattr(settings, split)
        if name is None:
            continue
        if on_hub(settings) and isinstance(name, str) and _is_split(name):
            train = cast(HubPairs, sources["train"])
            sources[split] = HubPairs(train.name, train.subset, name, train.languages, f"pairs.{split}")
        else:
            sources[split] = _source(f"pairs.{split}", name, settings)
    return sources


def on_hub(settings: PairSettings) -> bool:
    """Whether `pairs.train` is a data set of the hub."""
    return isinstance(settings.train, str) and not _is_local(expanded(settings.train, "pairs.train"), settings)


def absolute_name(place: str, setting: str | list[str] | None, settings: PairSettings) -> str | list[str] | None:
    """The value of `train`, `validation` or `test`, its paths absolute; names of the hub as they are."""
    if setting is None:
        return None
    if isinstance(setting, list):
        return [absolute(expanded(name, place)) for name in setting]
    name = expanded(setting, place)
    named_split = place != "pairs.train" and on_hub(settings) and _is_split(name)
    hub = named_split or (place == "pairs.train" and not _is_local(name, settings))
    return name if hub else absolute(name)


def _source(place: str, setting: str | list[str], settings: PairSettings) -> PairSource:
    languages = settings.source, settings.target
    if isinstance(setting, list):
        files = [Path(expanded(name, place)) for name in setting]
        for name, file in zip(setting, files, strict=True):
            if not file.is_file():
                raise UserError(f"`{place}` = {name!r}: no such file (looked from {Path.cwd()}); correct the path")
        return _aligned(place, _Text(files[0]), _Text(files[1]))
    name = expanded(setting, place)
    path = Path(name)
    if _is_records(name) and path.is_file():
        return _archived(place, path, languages) if path.suffix == ".zip" else RecordFile(_Text(path), languages)
    if _is_records(name) and not any(_candidates(name, languages[0])):
        raise UserError(f"`{place}` = {setting!r}: no such file (looked from {Path.cwd()}); correct the path")
    if place == "pairs.train" and not _is_local(name, settings):
        return _of_hub(name, settings)
    return _aligned(place, *(_Text(_found(place, setting, name, language)) for language in languages))


def _of_hub(name: str, settings: PairSettings) -> HubPairs:
    languages = settings.source, settings.target
    found = HubPairs(name, settings.subset, settings.split, languages, "pairs.train")
    try:
        reach(name, "data set", "pairs.train")
        found.content()
    except UserError as error:
        raise UserError(f"{error} (and there is none of {_tried(name, languages)} here)") from error
    return found


def _found(place: str, setting: str, prefix: str, language: str) -> Path:
    found = _candidates(prefix, language)
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(map(str, found))
        raise UserError(f"`{place}` = {setting!r}: there are {both}; give a list of the two files that are meant")
    what = ""
    if Path(prefix).is_dir():
        what = " is a folder, and"
    elif Path(prefix).is_file():
        what = " is a file of no known format (.tsv, .txt, .jsonl, .json, .zip), and"
    raise UserError(
        f"`{place}` = {setting!r}:{what} there is none of {_tried(prefix, (language,))} (looked from {Path.cwd()}); "
        "correct the path, or the languages in `pairs.source` and `pairs.target`"
    )


def _aligned(place: str, source: _Text, target: _Text) -> AlignedFiles:
    if (source.path.resolve(), source.member) == (target.path.resolve(), target.member):
        raise UserError(f"`{place}`: {source} is given for source and target; give the file of each language")
    return AlignedFiles((source, target))


def _archived(place: str, path: Path, languages: Pair) -> PairSource:
    """What a zip file holds: two files with the languages as suffixes, or one of records."""
    with reading(path), zipfile.ZipFile(path) as archive:
        names = [
            name
            for name in archive.namelist()
            if not name.endswith("/") and not any(part.startswith(("_", ".")) for part in name.split("/"))
        ]
    sides = [[name for name in names if name.endswith(f".{language}")] for language in languages]
    records = [name for name in names if Path(name).suffix in _RECORDS]
    records = [name for name in records if not name.endswith(".txt")] or records  # rather than a README.txt
    if [len(side) for side in sides] == [1, 1]:
        return _aligned(place, _Text(path, sides[0][0]), _Text(path, sides[1][0]))
    if not any(sides) and len(records) == 1:
        return RecordFile(_Text(path, records[0]), languages)
    wanted = " and ".join(f"one .{language}" for language in languages)
    raise UserError(
        f"`{place}`: {path} must hold {wanted} file, or one of records ({', '.join(_RECORDS)}), and holds "
        f"{', '.join(names[:8]) or 'none'}; unpack it and name the files"
    )


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    try:
        return archive.open(name)
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare compression
        raise UserError(f"{path}: {name} cannot be unpacked: {error}; unpack it and name the files") from error


def _is_local(name: str, settings: PairSettings) -> bool:
    languages = settings.source, settings.target
    return _looks_local(name) or Path(name).exists() or any(_candidates(name, language) for language in languages)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~", "$")) or _is_records(name) or is_path(name)


def _is_split(name: str) -> bool:
    """Whether ``name`` can be a split of a hub data set, such as `test` or `validation[:50%]`, and no file."""
    return not (name.startswith((".", "~", "$")) or "/" in name or _is_records(name))


def _is_records(name: str) -> bool:
    return name.endswith(".zip") or _extension(name) in _RECORDS


def _extension(name: str) -> str:
    path = Path(name)
    return Path(path.stem if path.suffix in COMPRESSED else name).suffix


def _names(prefix: str, language: str) -> list[str]:
    return [f"{prefix}.{language}{suffix}" for suffix in ("", *COMPRESSED)]


def _candidates(prefix: str, language: str) -> list[Path]:
    return [Path(name) for name in _names(prefix, language) if Path(name).is_file()]


def _tried(prefix: str, languages: Iterable[str]) -> str:
    return ", ".join(name for language in languages for name in _names(prefix, language))


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text)
