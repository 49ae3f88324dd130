"""Runs of many ranks as users start them: by ``accelerate launch``, or one process per rank as ``srun`` would.

Whatever happens, no process outlives its test: all inherit a token in their environment and are found by it, for the
launcher puts each rank into a session of its own, and a killed launcher leaves them without a parent.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RANK = ROOT / "tests" / "faulty_rank.py"
_TOKEN = "LLM_CHT_TEST_TOKEN"


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


class Launched:
    """A run of many processes that goes on; ``with`` ends all that is left of it."""

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]]) -> None:
        self._token = secrets.token_hex(8)
        # python -P: the scripts are files of other folders, the package is found by the path
        common = os.environ | {_TOKEN: self._token, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,  # not a file: a rank's limit on the size of files must not reach its messages
                stderr=subprocess.STDOUT,
                text=True,
                env=common | environment,
                start_new_session=True,
            )
            for command, environment in zip(commands, environments, strict=True)
        ]

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for process in self.processes:
            process.communicate()

    def ends(self, seconds: float = 200) -> tuple[list[int], list[str]]:
        """Exit codes and outputs of the processes that were started, waited for so long at most."""
        end, outputs = time.monotonic() + seconds, []
        for process in self.processes:
            try:
                outputs.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"no end within {seconds} s:\n{process.communicate()[0]}") from None
        return [process.returncode for process in self.processes], outputs

    def living(self, *marks: str) -> list[int]:
        """Process ids of all that belongs to the run, or of those with ``marks`` in their environment."""
        living, wanted = [], {mark.encode() for mark in (f"{_TOKEN}={self._token}", *marks)}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                    if wanted <= set((folder / "environ").read_bytes().split(b"\0")):  # empty once it is a zombie
                        living.append(int(folder.name))
        return living

    def kill(self) -> None:
        """Kill every process of the run."""
        while living := self.living():
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)


def launch(engine: str, *arguments: str | Path, fault: dict[str, Any] | None = None, restarts: int = 0) -> Launched:
    """``accelerate launch`` of two ranks under ``ddp``, ``zero1``, ``zero2`` or ``zero3``."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{engine}.yaml")]
    launcher += ["--main_process_port", free_port(), "--max_restarts", str(restarts)]
    return Launched([[*launcher, str(RANK), *map(str, arguments)]], [{"LLM_CHT_TEST_FAULT": json.dumps(fault)}])


def by_hand(
    of_rank: list[list[str | Path]],
    fault: dict[str, Any] | None = None,
    environments: list[dict[str, str]] | None = None,
) -> Launched:
    """A process per rank, with nothing but the environment to find each other; ``of_rank`` are their arguments."""
    size = str(len(of_rank))
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    common["LLM_CHT_TEST_FAULT"] = json.dumps(fault)
    own = environments or [{} for _ in of_rank]
    return Launched(
        [[sys.executable, str(RANK), *map(str, arguments)] for arguments in of_rank],
        [common | {"RANK": str(r), "LOCAL_RANK": str(r)} | extra for r, extra in enumerate(own)],
    )
