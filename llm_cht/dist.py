"""The ranks: who am I, and the few ways in which ranks speak to each other; no-ops alone, so one code path serves all.

Only torch.distributed is asked, never an environment variable: what a launcher promised and what the process group
really is have been seen to differ.

Small words (counts, digests, errors, "stop") go over a gloo group of their own on the CPU: they need no device, cannot
get between the collectives of a backward pass, and come as JSON, never as pickle. Tensors go over the default group.
While data are prepared one rank may wait hours for another, hence ``patient``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_cht.errors import UserError

_DAY = timedelta(days=1)
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|remote process|network error", re.I
)
_groups: dict[str, dist.ProcessGroup] = {}


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to ``world_size() - 1``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process prints and writes for all."""
    return rank() == 0


def open_control(timeout_s: float) -> None:
    """Make the groups for small words; every rank calls it once, when the process group exists."""
    if world_size() > 1:
        _groups["prompt"] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        _groups["patient"] = dist.new_group(backend="gloo", timeout=_DAY)


def gather(value: Any, patient: bool = False) -> list[Any]:
    """The JSON value of every rank, by rank."""
    if world_size() == 1:
        return [value]
    group = _groups["patient" if patient else "prompt"]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    all_padded = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(all_padded, padded, group=group)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(all_padded, sizes, strict=True)]


def from_main(value: Any, patient: bool = False) -> Any:
    """The JSON value of rank 0; what the other ranks give is not looked at."""
    return gather(value if is_main() else None, patient)[0]


def total(numbers: Sequence[float]) -> list[float]:
    """Element-wise sum over the ranks, in float64."""
    if world_size() == 1:
        return list(numbers)
    summed = torch.tensor(list(numbers), dtype=torch.float64)
    dist.all_reduce(summed, group=_groups["prompt"])
    return summed.tolist()


def total_counts(counts: Tensor) -> Tensor:
    """Element-wise sum of an int64 tensor on the CPU over the ranks."""
    if world_size() > 1:
        dist.all_reduce(counts, group=_groups["prompt"])
    return counts


def gather_counts(counts: Tensor) -> Tensor:
    """The int64 tensors (n,) of all ranks as (ranks, n), on the CPU."""
    if world_size() == 1:
        return counts[None]
    everybody = [torch.empty_like(counts) for _ in range(world_size())]
    dist.all_gather(everybody, counts, group=_groups["prompt"])
    return torch.stack(everybody)


@contextmanager
def together(patient: bool = False) -> Iterator[None]:
    """A block without collectives that may fail on some ranks: all go on after it, or all raise.

    A rank that fails for another reason than the user's (a defect) raises what it met and the others a ``UserError``:
    nobody is left waiting.

    Raises:
        UserError: what the block raised; if it did so on some ranks only, named with the first of them, the same
            sentence on all.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = gather(None if error is None else _sentence(error), patient)
    if error is not None and not isinstance(error, UserError):
        raise error
    if any(text is not None for text in told):
        raise agreed(_first(told)) from error


def agreed(message: str) -> UserError:
    """An error that all ranks raise."""
    error = UserError(message)
    error.everywhere = True
    return error


def lost_connection(error: BaseException) -> bool:
    """Whether an exception is what a collective raises when a peer is gone or does not answer.

    Torch has no class for it: gloo raises plain RuntimeErrors. A mismatch of shapes and the like is a defect.
    """
    if isinstance(error, UserError):
        return False
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return True
    return error.__cause__ is not None and lost_connection(error.__cause__)


def close() -> None:
    """Leave the process group, at the end of a run; a process that has none does nothing."""
    if world_size() > 1:
        _groups.clear()
        dist.destroy_process_group()


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _first(told: Sequence[str | None]) -> str:
    failed = {number: text for number, text in enumerate(told) if text is not None}
    number = min(failed)
    everywhere = len(failed) == len(told) and len(set(failed.values())) == 1  # no matter of one rank
    return failed[number] if everywhere else f"rank {number} of {len(told)}: {failed[number]}"


def send_parts(parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Part r goes to rank r; returns the parts received, that from rank r of ``sizes[r]`` elements. 1-D, one dtype."""
    if world_size() == 1:
        return list(parts)
    received = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(list(parts)), list(sizes), [len(part) for part in parts])
    return list(received.split(list(sizes)))


def spread(own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Everybody's 1-D tensor, by rank; ``sizes`` are their lengths. Empty ones cost nothing."""
    if world_size() == 1:
        return [own]
    everybody = [own if r == rank() else own.new_empty(size) for r, size in enumerate(sizes)]
    waiting = [dist.broadcast(part, r, async_op=True) for r, part in enumerate(everybody) if len(part)]
    for work in waiting:
        work.wait()
    return everybody


def sum_at(tensor: Tensor, owner: int) -> None:
    """Sum a tensor over the ranks into that of ``owner``; on the others its content is lost."""
    if world_size() > 1:
        dist.reduce(tensor, owner)
