"""Two nodes as launch/accelerate/nodes.yaml starts them, on one machine: stopped and resumed, equal to one node."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers import learned, tiny_config
from tests.launch.nodes import node, started, wait_for
from tests.launched import free_port

RUN = {"train": {"steps": 60}, "method": {"update_interval": 10}, "checkpoint": {"every": None}}


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The ranks that a launcher started; it itself must not get the signal, for it would kill them after a while."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [child for child in map(int, children) if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_are_stopped_resumed_and_equal_one(tmp_path):
    config, run, whole = tiny_config(tmp_path, **RUN), tmp_path / "run", tmp_path / "whole"
    port = free_port()
    with started([node(rank, port, config) for rank in range(2)], tmp_path) as nodes:
        wait_for(lambda: lines(run) > 5, nodes)
        for rank in ranks_of(nodes[1]):  # one is told, both stop
            os.kill(rank, signal.SIGUSR1)
        assert [launcher.wait(120) for launcher in nodes] == [0, 0], (tmp_path / "0.log").read_text()
    assert "SIGUSR1: saved" in (tmp_path / "0.log").read_text()
    assert not (run / "model").exists()
    port = free_port()
    with started([node(rank, port, config, "--resume", "auto") for rank in range(2)], tmp_path) as nodes:
        assert [launcher.wait(240) for launcher in nodes] == [0, 0], (tmp_path / "0.log").read_text()
    one = node(0, free_port(), config, "--run", whole)
    one[one.index("--num_machines") + 1] = "1"
    with started([one], tmp_path) as launched:
        assert launched[0].wait(240) == 0
    assert learned(run) == learned(whole)
