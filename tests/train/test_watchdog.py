"""Ranks that are lost or stuck in real runs of three processes, started as srun would and by torchrun."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from llm_cht.dist import lost_connection
from llm_cht.errors import UserError
from llm_cht.train.watchdog import Place, Seen, Watchdog, suspects

RANK = Path(__file__).with_name("watched.py")
RESUME = "go on from the last one with: llm-cht train run/config.yaml --resume auto"


@contextlib.contextmanager
def ranks(fault: str, culprit: int, timeout_s: float) -> Iterator[list[subprocess.Popen]]:
    """Three ranks with nothing but the environment to find each other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(RANK), fault, str(culprit), str(timeout_s)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def fault_time(process: subprocess.Popen) -> float:
    """Waits until a rank met its fault."""
    line = process.stdout.readline()
    assert line.startswith("fault "), process.stderr.read()
    return float(line.split()[1])


def ends(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and standard errors of all."""
    told = [process.communicate(timeout=60) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in told], [err for _, err in told]


def assert_message(err: str, *parts: str) -> None:
    """One message, nothing around it, with ``parts``."""
    lines = err.splitlines()
    assert lines[0].startswith("error: the run ended in the topology update of step 3, because "), err
    assert lines[-1] == f"Its checkpoints are whole; {RESUME}", err
    assert len(lines) == 3, err
    for part in parts:
        assert part in err, (part, err)


def test_killed_rank_is_named_by_rank_0():
    with ranks("kill", 2, 60) as all_ranks:
        met = fault_time(all_ranks[2])
        codes, _, errs = ends(all_ranks)
        assert time.monotonic() - met < 10
    assert codes == [1, 1, -signal.SIGKILL]
    name = f"rank 2 ({socket.gethostname()}, process {all_ranks[2].pid})"
    assert_message(errs[0], "1 of 3 ranks is lost", f"{name} is gone (killed, out of memory, crashed?), last seen")
    assert re.search(r"last seen [1-9]\.\d s ago in the topology update of step [23] \(__main__:\d+\)\n", errs[0]), (
        errs[0]
    )
    assert errs[1:] == ["", ""]


def test_killed_rank_0_is_named_by_ranks_that_hang_in_c():
    with ranks("kill_deaf", 0, 60) as all_ranks:
        met = fault_time(all_ranks[0])
        codes, _, errs = ends(all_ranks)
        assert time.monotonic() - met < 10
    assert codes == [-signal.SIGKILL, 1, 1]
    assert_message(errs[1], f"rank 0 ({socket.gethostname()}, process {all_ranks[0].pid}) is gone")
    assert [errs[0], errs[2]] == ["", ""]


@pytest.mark.parametrize("culprit", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_rank_is_named_at_the_time_out_and_ends_when_it_runs_on(culprit):
    others = [rank for rank in range(3) if rank != culprit]
    with ranks("stop", culprit, 6) as all_ranks:
        met = fault_time(all_ranks[culprit])
        codes, _, errs = ends([all_ranks[rank] for rank in others])
        assert 5.5 < time.monotonic() - met < 10
        assert all_ranks[culprit].poll() is None
        all_ranks[culprit].send_signal(signal.SIGCONT)
        assert ends([all_ranks[culprit]]) == ([1], [""], [""])
    assert codes == [1, 1]
    warning, _, message = errs[0].partition("\n")
    assert re.fullmatch(rf"warning: waiting \d s for rank {culprit} \(.+, without an answer", warning), errs[0]
    assert_message(message, f"rank {culprit} (", "does not answer, last seen", "`train.timeout_s` = 6")
    assert errs[1] == ""


def test_rank_that_stops_for_a_while_is_warned_of_once():
    with ranks("stop", 2, 9) as all_ranks:
        fault_time(all_ranks[2])
        time.sleep(5)
        all_ranks[2].send_signal(signal.SIGCONT)
        codes, outs, errs = ends(all_ranks)
    assert codes == [0, 0, 0]
    assert outs == ["ended\n"] * 3
    assert re.fullmatch(r"warning: waiting \d s for rank 2 .+: in the topology update of step 3 for .*\n", errs[0])
    assert errs[1:] == ["", ""]


def test_rank_that_hangs_but_beats_is_told_from_those_that_wait():
    with ranks("hang", 1, 4) as all_ranks:
        codes, _, errs = ends(all_ranks)
    assert codes == [1, 1, 1]
    assert_message(errs[0].partition("\n")[2], "rank 1 (", "answers, but has been in the topology update of step 3")
    assert errs[1:] == ["", ""]


def test_rank_that_makes_progress_is_waited_for():
    with ranks("export", 0, 3) as all_ranks:
        fault_time(all_ranks[0])
        assert ends(all_ranks) == ([0, 0, 0], ["ended\n"] * 3, [""] * 3)


def test_error_of_one_rank_keeps_its_traceback_and_ends_the_others():
    with ranks("bug", 1, 60) as all_ranks:
        codes, _, errs = ends(all_ranks)
    assert codes == [1, 1, 1]
    assert "LookupError: no such layer" in errs[1].splitlines()[-1]
    assert_message(errs[0], "rank 1 (", "stopped in", "by LookupError: no such layer")
    assert errs[2] == ""


def test_mistake_of_all_ranks_is_theirs_to_tell():
    with ranks("mistake", 0, 60) as all_ranks:
        assert ends(all_ranks) == ([1] * 3, [""] * 3, ["refused: the same on all ranks\n"] * 3)


def test_torchrun_does_not_hide_the_message():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    done = subprocess.run([*launch, str(RANK), "kill", "2", "60"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("error: the run ended in") == 1, done.stderr
    assert done.stderr.count("is gone (killed") == 1, done.stderr
    assert done.stderr.count(RESUME) == 1, done.stderr


def seen(changes: int = 5, idle: float = 100, silent: float = 0, calls: int = 9, waits: bool = True) -> Seen:
    """A rank as it is known at time 1000."""
    place = Place(3, "step", changes, calls, limit_s=60, seconds=idle - silent, waits=waits)
    return Seen("a rank", place, heard=1000 - silent)


@pytest.mark.parametrize(
    ("others", "groups"),
    [
        ([seen(), seen()], [([0, 1, 2], [0, 1, 2])]),
        ([seen(silent=50), seen(silent=50, idle=120)], [([1, 2], [2]), ([0, 1, 2], [0, 1, 2])]),
        ([seen(changes=4), seen(changes=3)], [([2], [2])]),
        ([seen(silent=50), seen(changes=3)], [([1], [1]), ([2], [2])]),
        ([seen(waits=False), seen()], [([1], [0, 1, 2])]),
        ([seen(calls=8), seen()], [([1], [0, 1, 2])]),
        ([seen(waits=False), seen(calls=8)], [([1], [0, 1, 2])]),
    ],
)
def test_suspects(others, groups):
    known = suspects({0: seen(), 1: others[0], 2: others[1]}, now=1000, silent_s=5)
    assert [(group.named, group.timed) for group in known] == groups


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:54195"), True),
        (RuntimeError("Timed out waiting 6000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (caused(ValueError("step failed"), RuntimeError("Connection reset by peer")), True),
        (RuntimeError("op.preamble.length <= op.nbytes. 40 vs 4"), False),
        (dist.DistBackendError("NCCL error: invalid usage"), False),
        (OSError("Connection reset by peer"), False),  # of a logger, of the hub
        (caused(UserError("the hub does not answer"), RuntimeError("timed out")), False),
    ],
)
def test_lost_connection(error, lost):
    assert lost_connection(error) == lost


def test_alone_it_does_nothing():
    with pytest.raises(RuntimeError), Watchdog(0.1, "", print) as watchdog:  # noqa: PT012
        watchdog.enter(1, "step")
        raise RuntimeError("Connection closed by peer")
