"""What a rank of ``test_rank_faults.py`` runs: ``launch/train.py``, with a fault that one rank meets for real.

``LLM_CHT_TEST_FAULT`` is JSON: at call number ``call`` of the function ``at`` ("module:name"), rank ``rank`` does
``do`` to itself: kill, stop, sleep, a full disk, a flipped bit, a signal. Ranks that a launcher starts again meet no
fault. Where ``note`` is given, the moment is written there.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_cht.cli import main


def full_disk(*_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ


def flip_bit(updater: Any, *_: Any) -> None:
    """Of a mask, as faulty memory would."""
    next(iter(updater.masks.values())).view(-1)[7] ^= True


def send(number: signal.Signals) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), number)


DEEDS: dict[str, Callable[..., None]] = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "term": send(signal.SIGTERM),
    "usr1": send(signal.SIGUSR1),
    "sleep": lambda *_: time.sleep(8),
    "full disk": full_disk,
    "flip": flip_bit,
}


def plant(fault: dict[str, Any]) -> None:
    """Let the function meet the fault at its ``call``-th call, before it does anything else."""
    place, _, name = fault["at"].partition(":")
    holder: Any = importlib.import_module(place)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, calls = getattr(holder, last), 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault["call"]:
            if "note" in fault:
                Path(fault["note"]).write_text(str(time.time()))
            DEEDS[fault["do"]](*arguments)
        return original(*arguments, **options)

    setattr(holder, last, faulty)


if __name__ == "__main__":
    planned = json.loads(os.environ.get("LLM_CHT_TEST_FAULT", "null"))
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if planned and first_life and int(os.environ["RANK"]) == planned["rank"]:
        plant(planned)
    sys.exit(main(["train", *sys.argv[1:]]))
