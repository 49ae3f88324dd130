"""``launch/train.py`` is ``llm-cht train``: the same arguments in, the same exit code out."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"


def test_arguments_and_exit_code_pass_through(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        seen.append(arguments)
        return 7

    monkeypatch.setattr("llm_cht.cli.main", main)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "run.yaml", "--train.steps", "3"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_info.value.code == 7
    assert seen == [["train", "run.yaml", "--train.steps", "3"]]
