"""launch/slurm.sh with commands of Slurm that start the tasks here: signal, queued again, resumed, complete."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import records, tiny_config
from tests.launch.nodes import ROOT, started, wait_for

SCRIPT = ROOT / "launch" / "slurm.sh"

# Two tasks; what comes before the command are srun's own options. Tells the process ids, ends with the worst code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for id in 0 1; do
    SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_NODEID=0 "$@" &
    ids+=("$!")
done
echo "${ids[@]}" > "$FAKE/tasks"
worst=0
for id in "${ids[@]}"; do
    wait "$id"
    code=$?
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$FAKE/asked"; fi
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two tasks."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    of_slurm = {
        "JOB_ID": str(os.getpid()),
        "NTASKS": "2",
        "JOB_NUM_NODES": "1",
        "JOB_NODELIST": "n",
        "CPUS_PER_TASK": "1",
    }
    environment = {f"SLURM_{name}": value for name, value in of_slurm.items()}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return environment | {"FAKE": str(tmp_path), "PATH": path, "PYTHON": sys.executable, "ENGINE": "ddp"}


def batch(job: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | job,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_script_is_sound():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


def test_what_the_script_needs_is_asked_for(job):
    without = batch(job, "config.yaml")
    assert (without.returncode, "--run FOLDER" in without.stderr) == (2, True)
    unknown = batch(job | {"ENGINE": "fsdp"}, "config.yaml", "--run=runs/x")
    assert (unknown.returncode, "ENGINE = fsdp; known: ddp" in unknown.stderr) == (2, True)


@pytest.mark.parametrize(
    ("code", "saves", "again"), [(0, True, True), (1, True, True), (1, False, False), (2, True, False)]
)
def test_queued_again_unless_it_would_fail_again(job, tmp_path, code, saves, again):
    """In place of Python a task that saves, or not, and ends with a code."""
    run = tmp_path / "run"
    task = tmp_path / "task"
    save = f"mkdir -p {run}/checkpoints/step-00000001" if saves else ":"
    task.write_text(f"#!/bin/bash\n{save}\nexit {code}\n")
    task.chmod(0o755)
    ended = batch(job | {"PYTHON": str(task)}, "config.yaml", "--run", run)
    assert (tmp_path / "asked").exists() == again, ended.stdout + ended.stderr
    assert ended.returncode == (0 if again else code)


def test_a_cancelled_job_is_not_queued_again(job, tmp_path):
    task = tmp_path / "task"
    task.write_text(f"#!/bin/bash\ntouch {tmp_path}/begun\nsleep 3\n")
    task.chmod(0o755)
    script = ["bash", SCRIPT, "config.yaml", "--run", tmp_path / "run"]
    with started([script], tmp_path, **job | {"PYTHON": str(task)}) as jobs:
        wait_for((tmp_path / "begun").exists, jobs)
        jobs[0].send_signal(signal.SIGTERM)
        assert jobs[0].wait(60) == 1
    assert not (tmp_path / "asked").exists()
    assert "was cancelled" in (tmp_path / "0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_stopped_by_the_signal_and_goes_on(job, tmp_path):
    changes = {"train": {"steps": 100}, "method": {"update_interval": 10}, "checkpoint": {"every": None}}
    config, run = tiny_config(tmp_path, **changes), tmp_path / "run"
    script = ["bash", SCRIPT, config, "--run", run]
    with started([script], tmp_path, **job) as jobs:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run, "train")) > 5, jobs)
        for task in map(int, (tmp_path / "tasks").read_text().split()):
            os.kill(task, signal.SIGUSR1)
        assert jobs[0].wait(120) == 0, (tmp_path / "0.log").read_text()
    assert (tmp_path / "asked").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    ended = batch(job, config, "--run", run)
    assert ended.returncode == 0, ended.stderr
    assert "resumed from" in ended.stderr
    assert "is complete" in ended.stdout
    assert [record["step"] for record in records(run, "train")] == list(range(1, 101))
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
