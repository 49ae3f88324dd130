"""One rank of a run that computes nothing: ``watched.py FAULT RANK TIMEOUT_S``; ``RANK`` meets ``FAULT`` at step 3.

A rank prints when it meets its fault, and ``ended`` when it ends well; messages of the watchdog go to standard error.
"""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.train.signals import StopSignals
from llm_cht.train.watchdog import Watchdog


def meet(fault: str, watchdog: Watchdog) -> None:
    """Do what is wrong, when the others know where this rank is."""
    time.sleep(0.5)
    print(f"fault {time.monotonic()}", flush=True)
    if fault in ("kill", "kill_deaf"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hang":
        time.sleep(60)
    elif fault == "bug":
        raise LookupError("no such layer")
    elif fault == "export":
        end = time.monotonic() + 2 * watchdog.timeout_s
        while time.monotonic() < end:
            watchdog.enter(3, "topology update")
            time.sleep(0.1)


def run(fault: str, culprit: int, timeout_s: float) -> None:
    """A few steps, the fault, a few steps."""
    resume = "llm-cht train run/config.yaml --resume auto"
    with StopSignals(launched=True), Watchdog(timeout_s, resume, lambda text: print(text, file=sys.stderr)) as watchdog:
        for step in range(6):
            watchdog.enter(step, "step")
            torch.distributed.all_reduce(torch.ones(10))
            watchdog.enter(step, "topology update")
            if step == 3 and fault == "mistake":
                raise UserError("the same on all ranks")
            if step == 3 and dist.rank() == culprit:
                meet(fault, watchdog)
            elif step == 3 and fault == "kill_deaf":
                time.sleep(60)  # as in an NCCL call, which does not end when a peer is gone
            dist.total([1.0])
    print("ended", flush=True)


if __name__ == "__main__":
    limit = float(sys.argv[3])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=limit + 30))
    dist.open_control(limit + 30)
    try:
        run(sys.argv[1], int(sys.argv[2]), limit)
    except UserError as error:
        sys.exit(f"refused: {error}")
    finally:
        torch.distributed.destroy_process_group()
