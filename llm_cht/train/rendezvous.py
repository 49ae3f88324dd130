"""A fresh start for ranks that a launcher starts again (``--max_restarts``): nothing of the last attempt is in the way.

The ranks of a process group find each other by what they put into a store. Under ``accelerate launch`` the launcher
keeps that store for all attempts, and torch takes it to be empty each time: the ranks of the second attempt read the
addresses of dead ones and fail to connect. Here rank 0 draws a word, tells it to those that live now, and the group is
made below it.

Rejected: the launcher's count of restarts as that word. Where nodes restart by themselves it differs between them.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, PrefixStore, Store, register_rendezvous_handler, rendezvous

from llm_cht import dist
from llm_cht.errors import UserError

_SCHEME = "anew"
_registered = False


@contextmanager
def meeting() -> Iterator[None]:
    """Around the first calls in which the ranks wait for each other, before a watchdog can say who is missing.

    Raises:
        UserError: one or more ranks did not come, or were lost meanwhile.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.lost_connection(error):
            raise
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        what = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"rank {rank} of {size} lost another rank, or waited for it in vain, while the run started: {what}. See "
            "what the other ranks wrote and whether all were started, then start the run again"
        ) from error


def init_method() -> str | None:
    """What ``init_process_group`` wants to be told; None where no launcher starts ranks again."""
    global _registered
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    if not _registered:
        register_rendezvous_handler(_SCHEME, _meet)
        _registered = True
    return f"{_SCHEME}://"


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    store, rank, size = next(rendezvous("env://", timeout=timeout, **options))
    yield PrefixStore(agree(store, rank, size, timeout.total_seconds()), store), rank, size
    raise RuntimeError("a process group is made once in the life of a process")


def agree(store: Store, rank: int, size: int, seconds: float) -> str:
    """A word that all ranks that live now have, and none that lived before. A collective of the ranks.

    Raises:
        DistStoreError: not all ranks came in time.
    """
    own = secrets.token_hex(8)
    if rank != 0:
        # what an earlier process of this rank asked is overwritten; if rank 0 answers it first, nobody listens
        store.set(f"asks/{rank}", own)
        store.wait([f"answer/{own}"], timedelta(seconds=seconds))
        word = store.get(f"answer/{own}").decode()
        store.add(f"heard/{word}", 1)
        return word
    answered: set[str] = set()
    end = time.monotonic() + seconds
    while (heard := store.add(f"heard/{own}", 0)) < size - 1:
        asking = [f"asks/{other}" for other in range(1, size) if store.check([f"asks/{other}"])]
        for question in {store.get(key).decode() for key in asking} - answered:
            store.set(f"answer/{question}", own)
            answered.add(question)
        if time.monotonic() > end:
            raise DistStoreError(f"timed out after {seconds:.0f} s: {heard + 1} of {size} ranks came")
        time.sleep(0.05)
    return own
