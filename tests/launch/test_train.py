"""``accelerate launch launch/train.py`` is ``llm-cht train``: a real launch trains, and a mistake is told as usual."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import records, tiny_config

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"


def launch(*arguments: str | Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=240
    )


def test_a_launched_run_trains_with_its_overrides(tmp_path):
    result = launch(tiny_config(tmp_path), "--train.steps", "4", "--method.update_interval", "2")
    assert result.returncode == 0, result.stderr
    assert "validation perplexity" in result.stdout
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_a_mistake_ends_the_launch(tmp_path):
    result = launch(tiny_config(tmp_path), "--train.stops", "4")
    assert result.returncode != 0
    assert "llm-cht: error: unknown key `train.stops`" in result.stderr
    assert not (tmp_path / "run").exists()
