"""Folders that are whole or not there, also after a kill between two renames."""

import errno
from pathlib import Path

import pytest

from llm_cht.errors import UserError
from llm_cht.files import absolute, discard, disk_errors, is_path, new_folder, settle


def test_new_folder_replaces_the_old_one(tmp_path):
    target = tmp_path / "a" / "b"
    for content in ("old", "new"):
        with new_folder(target) as fresh:
            (fresh / content).write_text(content)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b", "a/b/new"]


def test_new_folder_that_fails_changes_nothing(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b") as fresh:  # noqa: PT012
        (fresh / "half").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["b"]


def test_settle_after_a_kill_between_the_two_renames(tmp_path):
    (tmp_path / ".b.old").mkdir()
    (tmp_path / ".b.old" / "content").write_text("old")
    (tmp_path / ".b.new").mkdir()
    (tmp_path / ".other").mkdir()
    settle(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "b"]
    assert (tmp_path / "b" / "content").read_text() == "old"


def test_settle_after_a_kill_behind_the_second_rename(tmp_path):
    for name in ("b", ".b.old", ".b.trash"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    settle(tmp_path / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "b"]


def test_discard(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    discard(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "about_space"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("I/O error: File too large (os error 27)"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("Read-only file system (os error 30)"), False),
    ],
)
def test_only_a_full_disk_is_told_as_one(tmp_path, fault, about_space):
    with (
        pytest.raises(UserError, match=r"cannot write .*Nothing is lost") as error,
        disk_errors(tmp_path / "a" / "b", 10**6, "Nothing is lost."),
    ):
        raise fault
    assert ("It takes 1.0 MB" in str(error.value)) == ("Free space" in str(error.value)) == about_space
    assert ("Make the folder writable" in str(error.value)) != about_space


def test_names_that_can_only_be_paths():
    for name in ("nofam.yaml", "./nope", "../a", "/a/b", "~/a", "a/b/c", "a b", "", "owner/name.json", "a/"):
        assert is_path(name), name
    for name in ("gpt2", "openai-community/gpt2", "Qwen/Qwen3-0.6B", "llama_60m", "a_b/c.d"):
        assert not is_path(name), name


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b") == str(tmp_path / "b")
    assert absolute("~/b") == str(Path.home() / "b")
    assert absolute("") == ""
