"""Names to files, what a source's digest depends on, the standard library and data sets of the hub."""

import sysconfig
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError

from llm_cht.data.hub import hub_source, reach
from llm_cht.data.sources import builtin, is_local, local_files
from llm_cht.errors import UserError


def files(*names: object):
    return local_files("data.source", [str(name) for name in names], "text", None)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")


def test_files_folders_and_globs_in_order(tmp_path):
    fill(tmp_path, "b.txt", "a.txt", "c/d.jsonl", "notes.md")
    assert [path.name for path in files(tmp_path).files] == ["a.txt", "b.txt", "d.jsonl"]
    assert [path.name for path in files(tmp_path / "*.txt").files] == ["a.txt", "b.txt"]
    assert [path.name for path in files(tmp_path / "b.txt", tmp_path).files] == ["b.txt", "a.txt", "d.jsonl"]


def test_names_that_match_nothing(tmp_path):
    fill(tmp_path, "empty/notes.md", "table.csv")
    for name, words in {
        "none.txt": "no such file or folder",
        "*.txt": "the pattern matches no file",
        "empty": "no data files",
        "table.csv": "the extension says no known format",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            files(tmp_path / name)
        assert "data.source" in str(error.value)
        assert name in str(error.value)


def test_which_names_are_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "corpus/a.txt")
    local = ["corpus", "./x", "/x/y", "~/x", "*.txt", "a.txt", "a/b/c", "data.jsonl.xz"]
    assert all(map(is_local, local))
    assert not any(map(is_local, ["openwebtext", "owner/name", "owner/name-v1.0"]))


def test_digest_follows_content_and_not_place(tmp_path):
    fill(tmp_path, "a.txt")
    (tmp_path / "b.txt").write_text("text of a.txt\n")
    for sampled in (False, True):
        before = files(tmp_path / "a.txt").content(sampled)
        assert files(tmp_path / "b.txt").content(sampled) == before
        assert files(tmp_path / "a.txt", tmp_path / "b.txt").content(sampled) != before
        (tmp_path / "a.txt").write_text("text of A.txt\n")
        assert files(tmp_path / "a.txt").content(sampled) != before
        fill(tmp_path, "a.txt")


def test_builtin_is_the_standard_library_without_tests():
    source = builtin()
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in source.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any({"site-packages", "test", "tests"} & set(Path(name).parts) for name in names)
    module = names.index("argparse.py")
    assert list(source.documents(module)) == [(root / "argparse.py").read_text()]
    for shard in range(source.num_shards):  # every module is readable UTF-8
        assert len(list(source.documents(shard))) == 1


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set as the hub keeps it: three parquet files of ten rows, in a folder `datasets` can open."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for file in range(3):
        texts = [f"file {file} row {row}" for row in range(10)]
        pq.write_table(pa.table({"text": texts}), folder / "data" / f"train-{file:05d}-of-00003.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(hub_folder, streaming):
    source = hub_source(hub_folder, None, "train", "text", streaming)
    assert source.num_shards == (3 if streaming else 1)
    texts = [text for shard in range(source.num_shards) for text in source.documents(shard)]
    assert texts == [f"file {file} row {row}" for file in range(3) for row in range(10)]
    assert list(source.documents(0, 4)) == list(source.documents(0))[4:]
    assert source.content(sampled=False) == hub_source(hub_folder, None, "train", "text", streaming).content(False)


def test_hub_data_set_with_wrong_names(hub_folder):
    with pytest.raises(UserError, match=r"data\.split"):
        hub_source(hub_folder, None, "nosplit", "text", True)
    with pytest.raises(UserError, match="'nosubset' not found"):
        hub_source(hub_folder, "nosubset", "train", "text", True)
    with pytest.raises(UserError, match=r"no field `body`.*`text`"):
        list(hub_source(hub_folder, None, "train", "body", True).documents(0))


def test_the_hub_is_not_asked_for_what_can_only_be_a_path(monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"`data.tokenizer` = './nope': no such file or folder here; correct"):
        reach("./nope", "tokenizer", "data.tokenizer")


def test_hub_that_does_not_answer_or_know_the_name(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for error, words in {
        httpx.ConnectError("no route"): r"`data.source` = 'some/set': .*cannot be reached \(no route\)",
        HFValidationError("bad name"): "`data.source` = 'some/set': neither a file or folder here nor a data set",
    }.items():

        def ask(*_, error=error, **__):
            raise error

        monkeypatch.setattr(HfApi, "dataset_info", ask)
        with pytest.raises(UserError, match=words):
            reach("some/set", "data set", "data.source")
