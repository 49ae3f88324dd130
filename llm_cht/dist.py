"""Who am I among the ranks: no-ops alone, so that one code path serves one process and many.

Only torch.distributed is asked, never an environment variable: what a launcher promised and what the process group
really is have been seen to differ.
"""

from __future__ import annotations

import torch.distributed as dist


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to ``world_size() - 1``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process prints and writes for all."""
    return rank() == 0
