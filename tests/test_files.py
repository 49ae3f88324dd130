"""Folders that are whole or not there, also after a kill between two renames."""

import pytest

from llm_cht.files import discard, new_folder, settle


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
