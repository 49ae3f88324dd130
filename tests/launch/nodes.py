"""Runs of two processes that stand for two nodes, or two tasks of a cluster, on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def node(rank: int, port: str, *arguments: str | Path) -> list[str | Path]:
    """The command that launch/accelerate/nodes.yaml tells for node ``rank`` of two with one rank each."""
    config = ROOT / "launch" / "accelerate" / "nodes.yaml"
    options = ["--config_file", config, "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, *address]
    return [*launcher, ROOT / "launch" / "train.py", *arguments]


@contextlib.contextmanager
def started(commands: list[list[str | Path]], folder: Path, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """The commands at once, each with what it says in FOLDER/INDEX.log; none of their processes stays."""
    processes = []
    for index, command in enumerate(commands):
        with (folder / f"{index}.log").open("a") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                    start_new_session=True,
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(seen: Callable[[], bool], processes: list[subprocess.Popen], seconds: float = 200) -> None:
    """Until something is there, or a process ended, or the time is over."""
    end = time.monotonic() + seconds
    while not seen() and time.monotonic() < end and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    assert seen(), [process.poll() for process in processes]
