"""Sweeps through the real command line: results, a run that fails, stop and go on, and what must never be mixed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from llm_cht.cli import main
from tests.helpers import command, finished, learned, records, tiny_config, told

PATIENCE_S = 120


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Writes the sweep file of a tiny run; ``changes`` go over it."""
    tiny_config(tmp_path, train={"steps": 6}, validation={"every": None}, checkpoint={"every": None})

    def _write(**changes):
        values = {
            "base": str(tmp_path / "config.yaml"),
            "folder": str(tmp_path / "sweep"),
            "cases": {"dense": {"method.preset": "dense", "method.sparsity": 0}, "set": {"method.preset": "set"}},
            "seeds": [0],
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
        return path

    return _write


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_failing_run_is_told_and_the_others_go_on(write, tmp_path, capsys):
    missing = tmp_path / "nowhere.txt"
    cases = {"broken": {"data.source": str(missing)}, "set": {"method.preset": "set", "method.sparsity": 0.5}}
    file, folder = write(cases=cases), tmp_path / "sweep"
    assert main(["sweep", str(file)]) == 1
    out, err = capsys.readouterr()
    assert "[1 of 2] broken_seed0: FAILED" in err
    assert str(missing) in err
    assert "[2 of 2] set_seed0: perplexity" in err
    assert "1 of 2 runs failed: broken_seed0" in err
    assert "| broken | 0 of 1 | - |" in out
    assert (folder / "table.md").read_text() == out.removesuffix("\n")
    failed, good = results(folder)
    assert str(missing) in failed["failed"]
    assert "Traceback" not in failed["failed"]
    assert good["overrides"] == {"method.preset": "set", "method.sparsity": 0.5}
    assert (good["name"], good["seed"]) == ("set_seed0", 0)
    assert good["summary"] == records(folder / "set_seed0", "end")[0]["summary"]
    assert (folder / "set_seed0" / "report.html").is_file()

    assert main(["sweep", str(file), "--table"]) == 0
    assert capsys.readouterr().out == out
    told(
        main(["sweep", str(file), "--optimizer.lr", "0.5"]),
        capsys.readouterr().err,
        "`optimizer.lr` is 0.5 now and was 0.003",
        "the run `set_seed0` was made with other settings",
        f"remove {folder / 'set_seed0'} to run it again",
    )
    write(cases=cases, metric="perplexty")
    told(main(["sweep", str(file)]), capsys.readouterr().err, "did you mean `perplexity`?")


@pytest.mark.slow
def test_the_same_command_goes_on_and_repeats_what_failed_only(write, tmp_path):
    missing = tmp_path / "later.txt"
    cases = {
        "static": {"method.preset": "static"},
        "late": {"data.source": str(missing)},
        "set": {"method.preset": "set"},
    }
    file, folder = write(cases=cases), tmp_path / "sweep"
    steps = ("--train.steps", "300", "--method.update_interval", "3")
    process = command("sweep", file, *steps)
    stopped = folder / "set_seed0"
    until(lambda: (stopped / "metrics.jsonl").is_file() and bool(records(stopped, "train")), process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finished(process)
    assert (code, out) == (1, ""), err
    assert "[3 of 3] set_seed0: stopped" in err
    assert "SIGTERM: the sweep is stopped; the same command goes on" in err
    assert ["summary" in record for record in results(folder)] == [True, False]
    assert list((stopped / "checkpoints").glob("step-*")), "not saved"
    first = (folder / "static_seed0" / "metrics.jsonl").stat()

    missing.write_text((tmp_path / "text.txt").read_text())
    code, out, err = finished(command("sweep", file, *steps))
    assert code == 0, err
    assert "3 runs, 1 finished before" in err
    assert (folder / "static_seed0" / "metrics.jsonl").stat() == first
    assert [record["name"] for record in results(folder)] == ["static_seed0", "late_seed0", "set_seed0"]
    assert "resumed from" in (stopped / "log.txt").read_text()
    assert "| set | 1 of 1 |" in out

    whole = tmp_path / "whole"
    assert main(["train", str(stopped / "config.yaml"), "--run", str(whole)]) == 0
    assert learned(whole) == learned(stopped)


@pytest.mark.slow
def test_a_run_that_is_killed_is_told_with_the_signal(write, tmp_path):
    file, folder = write(cases={"set": {"method.preset": "set"}}), tmp_path / "sweep"
    process = command("sweep", file, "--train.steps", "100000", "--method.end_step", "9")
    run = folder / "set_seed0"
    until(lambda: (run / "metrics.jsonl").is_file() and bool(records(run, "train")), process)
    (child,) = (Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()).split()
    os.kill(int(child), signal.SIGKILL)
    code, _, err = finished(process)
    assert code == 1
    assert "set_seed0: FAILED" in err
    assert "ended by SIGKILL (out of memory?); its last line: " in results(folder)[0]["failed"]


def test_a_folder_that_holds_something_else_is_refused(write, tmp_path, capsys):
    file, run = write(), tmp_path / "sweep" / "dense_seed0"
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("mine")
    told(main(["sweep", str(file)]), capsys.readouterr().err, f"{run} is not empty and holds no run")
    (tmp_path / "sweep" / "results.jsonl").write_text("{}\n")
    told(main(["sweep", str(file)]), capsys.readouterr().err, "results.jsonl, line 1 is damaged: remove that line")


def test_a_second_sweep_in_the_folder_is_refused(write, tmp_path, capsys):
    file, folder = write(), tmp_path / "sweep"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        told(main(["sweep", str(file)]), capsys.readouterr().err, f"another sweep is working in {folder}; wait until")
