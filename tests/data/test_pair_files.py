"""Sentence pairs of every format, and one error for each way a file, a name or a record can be bad."""

import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_cht.data.pair_files import HubPairs, fields_of, on_hub, pair_sources
from llm_cht.data.pair_settings import PairSettings
from llm_cht.errors import UserError

PAIRS = [("one", "eins"), ('"two" ', "zwei\u2028drei"), ("", "vier"), ("five", "fünf")]
PACK = {".xz": lzma.compress, ".gz": gzip.compress}


def write(path: Path, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACK.get(path.suffix, bytes)(raw))
    return str(path)


def lines(texts) -> str:
    return "".join(f"{text}\n" for text in texts)


def aligned(folder: Path, pairs=PAIRS, suffix: str = "") -> str:
    for language, texts in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        write(folder / f"train.{language}{suffix}", lines(texts))
    return str(folder / "train")


def archive(path: Path, **members: str) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return str(path)


def source(train, **settings):
    return pair_sources(PairSettings(train=train, **settings))["train"]


def pairs(train, **settings) -> list[tuple[str, str]]:
    return [pair for _, pair in source(train, **settings).pairs()]


def message(train, **settings) -> str:
    with pytest.raises(UserError) as error:
        pairs(train, **settings)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_aligned_files_by_prefix_and_by_list(tmp_path, suffix):
    prefix = aligned(tmp_path, suffix=suffix)
    assert pairs(prefix) == PAIRS
    files = [f"{prefix}.{language}{suffix}" for language in ("en", "de")]
    assert pairs(files) == PAIRS
    assert pairs(files[::-1]) == [(target, text) for text, target in PAIRS]
    assert pairs(prefix, source="de", target="en") == pairs(files[::-1])
    assert source(prefix).where(2, 1) == f"{files[1]}:2"


def test_windows_line_ends_byte_order_mark_and_a_last_line_without_end(tmp_path):
    write(tmp_path / "a.en", b"\xef\xbb\xbfone\r\ntwo\r\n")
    write(tmp_path / "a.de", "eins\nzwei")
    assert pairs(str(tmp_path / "a")) == [("one", "eins"), ("two", "zwei")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_records(tmp_path, suffix):
    tabbed = lines("\t".join([*pair, "a third column"][: 2 + (pair[0] == "one")]) for pair in PAIRS)
    for extension in (".tsv", ".txt"):
        assert pairs(write(tmp_path / f"a{extension}{suffix}", tabbed + "\n")) == [*PAIRS, ("", "")]
    flat = [{"id": 1, "en": text, "de": target} for text, target in PAIRS]
    nested = [{"translation": {"de": target, "en": text}} for text, target in PAIRS]
    for records in (flat, nested):
        for extension in (".jsonl", ".json"):
            path = write(tmp_path / f"a{extension}{suffix}", "\n" + lines(map(json.dumps, records)))
            assert pairs(path) == PAIRS
            assert [number for number, _ in source(path).pairs()] == [2, 3, 4, 5]


def test_a_record_is_one_line_and_null_is_blank():
    assert fields_of({"en": "a\r\nb", "de": None}, ("en", "de"), "here") == ("a b", "")


def test_archives(tmp_path):
    tabbed, english, german = lines(map("\t".join, PAIRS)), *(lines(side) for side in zip(*PAIRS, strict=True))
    path = tmp_path / "a.zip"
    assert pairs(archive(path, **{"deu.txt": tabbed, "_about.txt": "x", "__MACOSX/deu.txt": "x"})) == PAIRS
    assert source(str(path)).where(3, 0) == f"{path}, deu.txt:3"
    assert pairs(archive(path, **{"x/c.de-en.en": english, "x/c.de-en.de": german, "README.txt": "x"})) == PAIRS
    assert pairs(archive(path, **{"a.tsv": tabbed, "README.txt": "x"})) == PAIRS
    both = message(archive(path, **{"train.en": english, "train.de": german, "test.en": "", "test.de": ""}))
    assert "a.zip must hold one .en and one .de file" in both
    assert "train.en, train.de, test.en, test.de; unpack it" in both
    assert "holds none" in message(archive(path))


def test_damaged_archives(tmp_path):
    path = tmp_path / "a.zip"
    whole = Path(archive(path, **{"a.tsv": lines(f"{n}\t{n**7}" for n in range(5000))})).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "a.zip: the compressed file is truncated or damaged" in message(str(path))
    path.write_bytes(whole[:200] + bytes(100) + whole[300:])
    assert "a.zip: the compressed file is truncated or damaged" in message(str(path))


def test_locked_archive(tmp_path):
    path = tmp_path / "a.zip"
    whole = bytearray(Path(archive(path, **{"a.tsv": "a\tb\n"})).read_bytes())
    for start, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of a password, in both headers
        whole[whole.index(start) + place] |= 1
    path.write_bytes(whole)
    assert "a.tsv cannot be unpacked" in message(str(path))
    assert "password" in message(str(path))


@pytest.mark.parametrize(("language", "count"), [("en", 3), ("de", 3), ("en", 0)])
def test_files_of_unequal_length(tmp_path, language, count):
    prefix = aligned(tmp_path)
    write(tmp_path / f"train.{language}", lines("abc"[:count]))
    other = "de" if language == "en" else "en"
    told = message(prefix)
    assert f"train.{language} has {count} lines and {prefix}.{other} 4: line {count + 1} of the latter" in told


def test_wrong_encoding_is_named_with_file_byte_and_line(tmp_path):
    prefix = aligned(tmp_path)
    write(tmp_path / "train.de", b"eins\nzwei\n" + "fünf\n".encode("latin-1"))
    assert "train.de: not UTF-8 text at byte 11 (line 3)" in message(prefix)
    path = archive(tmp_path / "a.zip", **{"a.tsv": b"a\tb\nc\xff\td\n"})
    assert "a.zip, a.tsv: not UTF-8 text at byte 5 (line 2)" in message(path)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_truncated_compression(tmp_path, suffix):
    prefix = aligned(tmp_path, [(str(n**7), str(n)) for n in range(5000)], suffix)
    file = tmp_path / f"train.en{suffix}"
    file.write_bytes(file.read_bytes()[:-2000])
    assert f"train.en{suffix}: the compressed file is truncated or damaged" in message(prefix)


def test_bad_records(tmp_path):
    assert "a.tsv:2: one column" in message(write(tmp_path / "a.tsv", "a\tb\nc\n"))
    path = write(tmp_path / "a.jsonl", '{"en": "a", "fr": "b"}\n')
    assert "a.jsonl:1: no field `de`; set `pairs.source` and `pairs.target`" in message(path)
    assert "present: `en`, `fr`" in message(path)
    assert "a.jsonl:1: no field `de`" in message(write(tmp_path / "a.jsonl", '{"translation": {"en": "a"}}\n'))
    assert "a.jsonl:1: the field `de` holds a int" in message(write(tmp_path / "a.jsonl", '{"en": "a", "de": 3}\n'))
    assert "a.jsonl:1: not JSON" in message(write(tmp_path / "a.jsonl", '{"en": \n'))
    assert "a.jsonl:1: a line holds a JSON list" in message(write(tmp_path / "a.jsonl", "[]\n"))


def test_missing_files_and_what_was_tried(tmp_path):
    prefix = aligned(tmp_path)
    told = message(prefix, target="fr")
    assert f"there is none of {prefix}.fr, {prefix}.fr.xz, {prefix}.fr.gz" in told
    assert "no such file" in message([f"{prefix}.en", f"{prefix}.fr"])
    assert "no such file" in message(str(tmp_path / "none.tsv"))
    assert "is a folder" in message(str(tmp_path))
    assert "no known format (.tsv" in message(write(tmp_path / "a.csv", "a,b\n"))
    write(tmp_path / "train.en.gz", "one\n")
    assert "give a list of the two files" in message(prefix)


def test_one_file_for_both_sides(tmp_path):
    prefix = aligned(tmp_path)
    (tmp_path / "link.de").symlink_to(f"{prefix}.en")
    for files in ([f"{prefix}.en"] * 2, [f"{prefix}.en", str(tmp_path / "link.de")]):
        assert "is given for source and target" in message(files)


def test_variables_and_home_in_paths(tmp_path, monkeypatch):
    aligned(tmp_path)
    monkeypatch.setenv("PAIRS_HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PAIRS_NOWHERE", raising=False)
    for name in ("$PAIRS_HERE/train", "${PAIRS_HERE}/train", "~/train"):
        assert pairs(name) == PAIRS
    assert "variable PAIRS_NOWHERE is not set" in message("$PAIRS_NOWHERE/train")


def test_content_is_that_of_the_pairs_not_of_the_path(tmp_path):
    (tmp_path / "other").mkdir()
    content = source(aligned(tmp_path)).content()
    assert source(aligned(tmp_path / "other")).content() == content
    assert source(aligned(tmp_path, PAIRS[1:])).content() != content


@pytest.fixture
def hub_folder(tmp_path) -> str:
    """A data set as the hub keeps it, in a folder that `datasets` can open."""
    rows = [{"en": text, "de": target} for text, target in PAIRS]
    (tmp_path / "data").mkdir()
    for split, kept in (("train", rows), ("test", rows[:2])):
        pq.write_table(pa.table({"translation": kept}), tmp_path / "data" / f"{split}-00000.parquet")
    return str(tmp_path)


def test_hub_data_set(hub_folder):
    found = HubPairs(hub_folder, None, "train", ("en", "de"), "pairs.train")
    assert [pair for _, pair in found.pairs()] == PAIRS
    assert found.where(1, 0) == f"hub data set {hub_folder}, split train, row 1"
    assert found.content() != HubPairs(hub_folder, None, "test", ("en", "de"), "pairs.test").content()
    with pytest.raises(UserError, match="row 0: no field `fr`"):
        list(HubPairs(hub_folder, None, "train", ("en", "fr"), "pairs.train").pairs())
    with pytest.raises(UserError, match=r"see `pairs\.test`, `pairs\.subset`"):
        HubPairs(hub_folder, None, "nosplit", ("en", "de"), "pairs.test").content()


def test_names_of_the_hub(hub_folder, monkeypatch):
    from llm_cht.data import hub

    load = hub.load_dataset_builder
    monkeypatch.setattr(hub, "load_dataset_builder", lambda name, subset: load(hub_folder, subset))
    settings = PairSettings(train="owner/pairs", validation="test", test="train[:1]")
    assert on_hub(settings)
    found = pair_sources(settings)
    assert {name: len(list(source.pairs())) for name, source in found.items()} == {
        "train": 4,
        "validation": 2,
        "test": 1,
    }
    own = aligned(Path(hub_folder))
    assert "train.en" in pair_sources(PairSettings(train="owner/pairs", test=own))["test"].place


def test_a_name_that_is_nowhere_tells_what_was_looked_for(monkeypatch):
    told = message("owner/nothing_of_this_name")
    assert "hub data set owner/nothing_of_this_name" in told
    assert "owner/nothing_of_this_name.en.gz" in told
