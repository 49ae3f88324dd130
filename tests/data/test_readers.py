"""Documents of single files: the rules for text, the formats, and one error for each way a file can be bad."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_cht.data.readers import read_documents
from llm_cht.errors import UserError

TEXT = "one\ntwo\n\n \nthree\n\n\n"
WIKI = " \n = First = \n \n a b \n \n = = Section = = \n \n x = y \n = not a title = \n \n = Second = \n \n c \n"


def documents(path: Path, rule=None, start: int = 0, field: str = "text") -> list[str]:
    return list(read_documents(path, field, rule, start))


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(raw))
    return path


def parquet(path: Path, texts: list[str | None], field: str = "text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), field: pa.array(texts, pa.string())}), path, 2)
    return path


def message(path: Path, **how) -> str:
    with pytest.raises(UserError) as error:
        documents(path, **how)
    assert path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, ["one\ntwo", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("line", ["one", "two", "", " ", "three", "", ""]),
        ("file", [TEXT]),
    ],
)
def test_rules_of_text(tmp_path, rule, expected):
    assert documents(write(tmp_path / "a.txt", TEXT), rule) == expected


def test_articles_are_the_rule_of_tokens_files_and_lose_nothing(tmp_path):
    found = documents(write(tmp_path / "wiki.tokens", WIKI))
    assert [text.split(" \n")[0] for text in found] == ["", " = First =", " = Second ="]
    assert "".join(found) == WIKI
    assert documents(write(tmp_path / "wiki.txt", WIKI), "article") == found


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_formats_plain_and_compressed(tmp_path, suffix):
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in ("one", "two", "thrée"))
    assert documents(write(tmp_path / f"a.jsonl{suffix}", lines + "\n")) == ["one", "two", "thrée"]
    assert documents(write(tmp_path / f"a.txt{suffix}", TEXT)) == ["one\ntwo", "three"]
    table = parquet(tmp_path / "plain.parquet", ["one", None, "two"])
    assert documents(write(tmp_path / f"b.parquet{suffix}", table.read_bytes())) == ["one", "", "two"]


def test_every_format_can_be_entered_at_any_document(tmp_path):
    texts = [f"text {number}" for number in range(7)]
    files = [
        write(tmp_path / "a.txt", "\n\n".join(texts)),
        write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts)),
        parquet(tmp_path / "a.parquet", texts),
    ]
    for path in files:
        for start in range(9):
            assert documents(path, start=start) == texts[start:]


def test_byte_order_mark_and_half_surrogates_do_no_harm(tmp_path):
    assert documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]
    assert documents(write(tmp_path / "a.jsonl", '{"text": "a\\ud83db"}\n')) == ["a?b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tokens", "a.txt.xz", "a.jsonl.gz"])
def test_empty_file(tmp_path, name):
    assert "empty" in message(write(tmp_path / name, ""))


def test_empty_parquet(tmp_path):
    assert "empty" in message(parquet(tmp_path / "a.parquet", []))


def test_binary_files_are_named_with_offset_and_line(tmp_path):
    assert "byte 6 (line 2): a zero byte" in message(write(tmp_path / "a.txt", b"text\nb\0c"))
    assert "byte 5 (line 2): invalid start byte" in message(write(tmp_path / "b.txt.gz", b"text\n\xff\xfe"))


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_truncated_and_damaged_compression(tmp_path, name, suffix):
    content = "".join(f'{{"text": "{number}"}}\n' for number in range(5000))
    whole = write(tmp_path / f"{name}{suffix}", content).read_bytes()
    cut = tmp_path / f"cut_{name}{suffix}"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in message(cut, rule="file")
    cut.write_bytes(b"this is not compressed")
    assert "truncated or damaged" in message(cut, rule="file")


def test_bad_lines_of_json_are_named(tmp_path):
    good = '{"text": "a"}\n'
    assert "bad.jsonl:2: not JSON" in message(write(tmp_path / "bad.jsonl", good + '{"text" "b"}\n' + good))
    assert "truncated" in message(write(tmp_path / "cut.jsonl", good + '{"text": "b'))
    assert "list.jsonl:1" in message(write(tmp_path / "list.jsonl", "[1]\n"))
    assert "null.jsonl" in message(write(tmp_path / "null.jsonl", "3\n"))


def test_missing_and_wrong_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "a", "id": 1}\n')
    assert "a.jsonl:1: no field `text`" in message(path)
    assert "`body`, `id`" in message(path)
    assert "a.jsonl:1: the field `id` holds a int" in message(path, field="id")
    table = parquet(tmp_path / "a.parquet", ["a"], "body")
    assert "`id`, `body`" in message(table)
    assert "row 0: the field `id` holds a int" in message(table, field="id")


def test_unreadable_parquet(tmp_path):
    whole = parquet(tmp_path / "a.parquet", ["text"] * 100).read_bytes()
    assert "not a whole parquet file" in message(write(tmp_path / "cut.parquet", whole[:-10]))
    assert "not a whole parquet file" in message(write(tmp_path / "text.parquet", b"text"))


def test_wikitext_has_its_known_number_of_articles(data_dir):
    for name in ("wiki.valid.tokens", "wiki.test.tokens"):
        assert sum(bool(text.strip()) for text in documents(data_dir / "wikitext2" / name)) == 60
