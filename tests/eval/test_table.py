"""The table over runs: the best learning rate by mean over seeds, and errors for folders that are no finished run."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

SCRIPT = Path(__file__).parents[2] / "eval" / "table.py"


def make_run(folder: Path, preset: str, lr: float, seed: int, perplexity: float, ended: bool = True) -> Path:
    folder.mkdir()
    config = {"method": {"preset": preset, "sparsity": 0.9}, "optimizer": {"lr": lr}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {"perplexity": perplexity, "average_density": 0.1, "seconds": 60.0}
    record = {"kind": "end", "step": 9, "seconds": 1, "summary": summary}
    record = record if ended else {"kind": "start", "step": 0, "seconds": 0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def table(*folders: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *folders], capture_output=True, text=True, check=False)


def test_the_best_rate_is_chosen_by_its_mean_over_the_seeds(tmp_path):
    rows = [(3e-3, 0, 20.0), (3e-3, 1, 22.0), (1e-2, 0, 19.0), (1e-2, 1, 25.0), (1e-1, 0, 1.0)]
    runs = [make_run(tmp_path / str(i), "chts", lr, seed, ppl) for i, (lr, seed, ppl) in enumerate(rows)]
    out = table(*runs).stdout
    assert "| chts | 0.9 | 0.003 | 2 | 21.00 | 20.00 | 22.00 | 0.100 | 60 |" in out
    assert "| chts | 0.9 | 0.1 | 0 | 1.00 |" in out


def test_folders_that_are_no_finished_run(tmp_path):
    result = table(tmp_path)
    assert result.returncode == 2
    assert "no config.yaml" in result.stderr
    result = table(make_run(tmp_path / "a", "set", 1e-3, 0, 1.0, ended=False))
    assert result.returncode == 2
    assert "has not run to its end" in result.stderr
