"""Cache folders are whole or not there."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm_cht.data.cache import built, cache_root
from llm_cht.errors import UserError

PROGRAM = """
import os, sys, time
from pathlib import Path
from llm_cht.data.cache import built

def make(folder):
    (folder / "half").write_text("x")
    {act}
    (folder / "whole").write_text("x")
    with open(root / "made", "a") as file:
        file.write("once ")

root = Path(sys.argv[1])
built(root / "cache" / "data", make)
"""


def start(folder: Path, act: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(act=act), str(folder)])


def make(folder: Path) -> None:
    (folder / "whole").write_text("x")


def test_a_killed_preparation_is_not_believed(tmp_path):
    assert start(tmp_path, "os.kill(os.getpid(), 9)").wait() == -9
    assert (tmp_path / "cache" / "data.partial" / "half").is_file()
    assert not (tmp_path / "cache" / "data").exists()
    folder = built(tmp_path / "cache" / "data", make)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not (tmp_path / "cache" / "data.partial").exists()


def test_processes_that_need_the_same_folder_make_it_once(tmp_path):
    processes = [start(tmp_path, "time.sleep(0.3)") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "once "


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        make(folder)
        raise UserError("bad file")

    with pytest.raises(UserError, match="bad file"):
        built(tmp_path / "data", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_whole_folder_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    assert built(tmp_path / "data", lambda _: pytest.fail("made again")) == tmp_path / "data"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # no lock file: the cache may be read-only


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*`data\.cache_dir`"):
        built(tmp_path / "file" / "cache" / "data", make)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; free space"):
        built(tmp_path / "data", full)


def test_place_of_the_cache(monkeypatch):
    monkeypatch.setenv("LLM_CHT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root("/c") == Path("/c")
    assert cache_root(None) == Path("/a")
    monkeypatch.delenv("LLM_CHT_CACHE")
    assert cache_root(None) == Path("/b/llm_cht")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == Path.home() / ".cache" / "llm_cht"
