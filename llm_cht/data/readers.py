"""Documents of one local file: text, JSON lines or parquet, plain or compressed with gzip or xz.

Own readers of a few lines each, because a bad file must be named with its line or byte offset; the loaders of
``datasets`` report the row of a batch, or nothing. Files are read as a stream, never whole, except documents that are
files and compressed parquet (parquet needs to jump). Blank documents are yielded like others: the caller counts them.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from llm_cht.errors import UserError

Rule = Literal["paragraph", "line", "file", "article"]
TEXT = (".txt", ".text", ".tokens")
JSON_LINES = (".jsonl", ".json")
PARQUET = (".parquet",)
COMPRESSED = (".xz", ".gz")
KNOWN = "`.txt`, `.text`, `.tokens`, `.jsonl`, `.json` (lines), `.parquet`, and these with `.xz` or `.gz`"

_ARTICLE = re.compile(r" = [^=]+ = \n?")  # ` = = Section = = ` has two signs a side
_BROKEN_STREAM = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


def kind(path: Path) -> str | None:
    """'.txt', '.jsonl', ...: the extension that tells the format, below any compression; None if it is not known."""
    suffixes = path.suffixes[-2:] if path.suffix in COMPRESSED else path.suffixes[-1:]
    extension = suffixes[0] if suffixes else ""
    return extension if extension in TEXT + JSON_LINES + PARQUET else None


def read_documents(path: Path, text_field: str, rule: Rule | None, start: int = 0) -> Iterator[str]:
    """Documents of ``path`` in order, from number ``start`` on.

    ``text_field`` is the field of JSON lines and parquet. ``rule`` says what a document of a text file is: `paragraph`
    (a block of lines, up to a blank line), `line`, `file`, `article` (from a ` = Title = ` line after a
    blank one to the next, as in WikiText); None means `article` for `.tokens` and `paragraph` for other text.

    Raises:
        UserError: the file cannot be read or decompressed, is binary, holds no document, or a record is not as it
            should be; the message names file and line or offset.
    """
    with reading(path):
        documents = _documents(path, text_field, rule, start)
        first = next(documents, None)
        if first is None and start == 0:
            raise UserError(f"{path}: the file is empty; leave it out, or put text in it")
        if first is not None:
            yield first
            yield from documents


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong while ``path`` is read into a ``UserError``."""
    try:
        yield
    except _BROKEN_STREAM as error:
        raise UserError(f"{path}: the compressed file is truncated or damaged ({error}); fetch it again") from error
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole parquet file ({reason}); fetch it again") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; correct its permissions, or fetch it again"
        ) from error


def _documents(path: Path, text_field: str, rule: Rule | None, start: int) -> Iterator[str]:
    extension = kind(path)
    if extension in PARQUET:
        return _parquet(path, text_field, start)
    if extension in JSON_LINES:
        documents = _json_documents(json_records(_lines(path), str(path)), text_field)
    else:
        documents = _text_documents(_lines(path), rule or ("article" if extension == ".tokens" else "paragraph"))
    return itertools.islice(documents, start, None)


def opened(path: Path) -> BinaryIO:
    """The bytes of ``path``, decompressed."""
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    return path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    with opened(path) as file:
        yield from decoded(file, str(path))


def decoded(file: BinaryIO, place: str) -> Iterator[str]:
    """Lines of ``file`` with their ends, decoded strictly as UTF-8; a byte order mark is dropped.

    Raises:
        UserError: other bytes, or a zero byte; it names ``place``, line and byte.
    """
    offset = 0
    for number, raw in enumerate(file, 1):
        try:
            if b"\0" in raw:
                raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), raw.index(b"\0") + 1, "a zero byte")
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}: not UTF-8 text at byte {offset + error.start} (line {number}): {error.reason}; "
                "convert the file to UTF-8, or leave it out if it is binary"
            ) from error
        offset += len(raw)
        yield line.removeprefix("\ufeff") if number == 1 else line


def _text_documents(lines: Iterable[str], rule: Rule) -> Iterator[str]:
    if rule == "file":
        text = "".join(lines)
        return iter([text] if text else [])
    if rule == "line":
        return (line.rstrip("\r\n") for line in lines)
    return _articles(lines) if rule == "article" else _paragraphs(lines)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "".join(block).rstrip("\r\n")


def _articles(lines: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if _ARTICLE.fullmatch(line) and article and not article[-1].strip():
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def json_records(lines: Iterable[str], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place (path and line) and object of each JSON line; blank lines are passed over.

    Raises:
        UserError: a line is not a JSON object.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            cut = "" if line.endswith("\n") else "; the last line: is the file truncated?"
            raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno}){cut}") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: a line holds a JSON {type(record).__name__}, not an object with fields")
        yield place, record


def _json_documents(records: Iterable[tuple[str, dict[str, Any]]], text_field: str) -> Iterator[str]:
    for place, record in records:
        if text_field not in record:
            raise missing_field(place, text_field, record)
        yield as_text(record[text_field], place, text_field)


def _parquet(path: Path, text_field: str, start: int) -> Iterator[str]:
    whole = io.BytesIO(opened(path).read()) if path.suffix in COMPRESSED else path
    with pq.ParquetFile(whole) as file:
        if text_field not in file.schema_arrow.names:
            raise missing_field(str(path), text_field, file.schema_arrow.names)
        row = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row + num_rows > start:  # groups before the start are not even read
                skip = max(0, start - row)
                batches = file.iter_batches(1024, row_groups=[group], columns=[text_field])
                values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                for index, value in enumerate(itertools.islice(values, skip, None), row + skip):
                    yield as_text(value, f"{path}, row {index}", text_field)
            row += num_rows


def missing_field(place: str, field: str, present: Iterable[str], setting: str = "data.text_field") -> UserError:
    """The error for a record without the ``field`` that ``setting`` names; it names the fields there are."""
    fields = ", ".join(f"`{name}`" for name in present) or "none"
    return UserError(f"{place}: no field `{field}`; set `{setting}` to one of those present: {fields}")


def as_text(value: Any, place: str, field: str, setting: str = "data.text_field") -> str:
    """The text of a record; null counts as a blank one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: the field `{field}` holds a {type(value).__name__}, not text; set `{setting}`")
    return value.encode("utf-8", "replace").decode()  # JSON may spell half a surrogate pair, which is no text
