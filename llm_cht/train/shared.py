"""One file system for all ranks: without it every node would keep a part of each checkpoint and none a whole one.

Looked at by doing: rank 0 makes something, the others must see it. A network file system may show it late, hence a
wait. Rejected: comparing device numbers or mount points, which differ between nodes that share a file system.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from pathlib import Path

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.files import disk_errors

WAIT_S = 60.0
"""as long as NFS, as it comes, may believe what it last saw of a folder"""


def check_shared(run: Path) -> None:
    """See that the folder of a run (or the one it is to be made in) is the same on all ranks; leaves nothing there.

    Every rank calls it.

    Raises:
        UserError: it is not, or cannot be written.
    """
    if dist.world_size() == 1:
        return
    places = [run.absolute(), *run.absolute().parents]
    up = next(i for i, place in enumerate(places) if place.is_dir())
    up, name = dist.from_main([up, f".shared-{secrets.token_hex(8)}"])
    marker = places[up] / name
    try:
        with dist.together(), disk_errors(run, 0, "Nothing was written."):
            if dist.is_main():
                marker.touch()
        with dist.together(patient=True):
            see(marker)
    finally:
        if dist.is_main():
            marker.unlink(missing_ok=True)


def see(path: Path) -> None:
    """Wait until something that rank 0 has made is here.

    Raises:
        UserError: it does not appear.
    """
    end = time.monotonic() + WAIT_S
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise not_shared(platform.node(), path, "rank 0 has made")
        time.sleep(0.05)


def not_shared(node: str, path: Path, origin: str) -> UserError:
    """The error for something that should be there and is not seen."""
    return UserError(
        f"node {node} does not see {path}, which {origin}; all ranks must share a file system: give a `run` folder "
        "that is on one"
    )
