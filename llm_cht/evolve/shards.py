"""Which part of a parameter this rank holds: fp32 master weight and optimizer moments, under every engine.

One process and DDP hold everything; ZeRO 1 and 2 a piece of the flattened masters and moments beside a whole working
copy; ZeRO 3 a piece of the working copy too. All else in the project asks here and never looks into an optimizer or at
DeepSpeed. Everything is local: no function here is a collective, so none can hang.

Rejected: DeepSpeed's ``safe_get_full_*`` and ``GatheredParameters`` (collective: every rank gets every weight, and
writes never reach the fp32 master) and ``safe_set_full_fp32_param`` (leaves the bf16 copy stale). An optimizer state
that is not known raises: skipping it silently would leave stale moments on new links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_cht import dist
from llm_cht.errors import UserError

MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "age"})
"""state with one number per weight; 0 on new links"""
_COUNTERS = frozenset({"step"})

Read = Callable[[int, int], Tensor]
"""elements start to stop of a flattened parameter, 1-D"""


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of one parameter, as views: writing to them is writing to the optimizer."""

    start: int
    """position of the first element in the flattened parameter"""
    master: Tensor
    """1-D, as the optimizer sees it: fp32, or bf16 where a run keeps its weights in bf16"""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """1-D, as long as ``master``; empty before the first optimizer step"""

    @property
    def stop(self) -> int:
        """Position behind the last element."""
        return self.start + self.master.numel()


class Whole:
    """Everything is here: one process, or DDP."""

    sharded = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def fragment(self, parameter: Tensor) -> Fragment | None:
        """The whole parameter."""
        state = self.optimizer.state.get(parameter, {})
        moments = {key: value.view(-1) for key, value in state.items() if key in MOMENTS and value is not None}
        return Fragment(0, parameter.detach().view(-1), moments)

    @torch.no_grad()
    def write(self, parameter: Tensor, changed: Tensor, index: Tensor, values: Tensor) -> None:
        """Set the elements where ``changed`` (bool, flat) to 0, then those at ``index`` to ``values``; moments to 0."""
        _write_fragment(self.fragment(parameter), changed, index, values)

    @torch.no_grad()
    def load(self, parameter: Tensor, read: Read) -> None:
        """Set the parameter to what ``read`` gives."""
        parameter.view(-1).copy_(read(0, parameter.numel()))

    def step(self) -> float | None:
        """The optimizer's step counter; None before the first step."""
        return _step(self.optimizer)

    def make_moments(self, parameters: Iterable[Tensor], keys: Iterable[str], step: float) -> None:
        """Give every parameter zero moments ``keys`` and the counter ``step``, as a loaded optimizer has them."""
        _make_moments(self.optimizer, parameters, keys, step)


class Zero12:
    """ZeRO 1 and 2: masters and moments in flat groups, cut between the ranks; the working copy is whole everywhere."""

    sharded = True

    def __init__(self, zero: Any) -> None:
        self.zero = zero  # DeepSpeed's wrapper, whose .optimizer is torch's
        self.optimizer: Optimizer = zero.optimizer

    def fragment(self, parameter: Tensor) -> Fragment | None:
        """None where this rank holds nothing of it."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        here = mapping.hp_fragment_address
        # mapping.optim_fragment can be missing or stale: look the moments up where the optimizer has them
        state = self.optimizer.state.get(self.zero.single_partition_of_fp32_groups[mapping.param_group_index], {})
        moments = {k: v.view(-1).narrow(0, here.start, here.numel) for k, v in state.items() if k in MOMENTS}
        return Fragment(mapping.lp_fragment_address.start, mapping.hp_fragment.detach().view(-1), moments)

    @torch.no_grad()
    def write(self, parameter: Tensor, changed: Tensor, index: Tensor, values: Tensor) -> None:
        """As ``Whole.write``: working copy, and what is here of master and moments."""
        working = parameter.detach().view(-1).masked_fill_(changed, 0)
        working[index] = values.to(working.dtype)
        _write_fragment(self.fragment(parameter), changed, index, values)

    @torch.no_grad()
    def load(self, parameter: Tensor, read: Read) -> None:
        """As ``Whole.load``."""
        parameter.view(-1).copy_(read(0, parameter.numel()))
        if part := self.fragment(parameter):
            part.master.copy_(read(part.start, part.stop))

    def step(self) -> float | None:
        """As ``Whole.step``."""
        return _step(self.optimizer)

    def make_moments(self, parameters: Iterable[Tensor], keys: Iterable[str], step: float) -> None:
        """As ``Whole.make_moments``."""
        _make_moments(self.optimizer, self.zero.single_partition_of_fp32_groups, keys, step)


class Zero3:
    """ZeRO 3: the working copy is cut too; small parameters ("persistent" ones) are whole on every rank besides."""

    sharded = True

    def __init__(self, zero: Any, rank: int) -> None:
        self.zero = zero
        self.rank = rank
        self.optimizer: Optimizer = zero.optimizer

    def fragment(self, parameter: Any) -> Fragment | None:
        """None where this rank holds nothing of it."""
        start = self.rank * parameter.ds_tensor.ds_numel
        here = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)  # the last piece is padded
        if here <= 0:
            return None
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        master = self.zero.fp32_partitioned_groups_flat[group]
        state = self.optimizer.state.get(master, {})
        moments = {k: v.view(-1).narrow(0, offset, here) for k, v in state.items() if k in MOMENTS}
        return Fragment(start, master.detach().narrow(0, offset, here), moments)

    @torch.no_grad()
    def write(self, parameter: Any, changed: Tensor, index: Tensor, values: Tensor) -> None:
        """As ``Whole.write``: what is here of working copy, master and moments."""
        part = self.fragment(parameter)
        if part is not None:
            _write_fragment(part, changed, index, values)
            _working_piece(parameter, part).copy_(part.master)
        if _is_whole(parameter):
            working = parameter.data.view(-1).masked_fill_(changed, 0)
            working[index] = values.to(working.dtype)

    @torch.no_grad()
    def load(self, parameter: Any, read: Read) -> None:
        """As ``Whole.load``."""
        if part := self.fragment(parameter):
            part.master.copy_(read(part.start, part.stop))
            _working_piece(parameter, part).copy_(part.master)
        if _is_whole(parameter):
            parameter.data.view(-1).copy_(read(0, parameter.ds_numel))

    def step(self) -> float | None:
        """As ``Whole.step``."""
        return _step(self.optimizer)

    def make_moments(self, parameters: Iterable[Tensor], keys: Iterable[str], step: float) -> None:
        """As ``Whole.make_moments``."""
        _make_moments(self.optimizer, self.zero.fp32_partitioned_groups_flat, keys, step)


Shards = Whole | Zero12 | Zero3


def shards_of(optimizer: Any) -> Shards:
    """Where weights and moments are under ``optimizer``: torch's, one wrapped by accelerate, or DeepSpeed's of ZeRO.

    Raises:
        UserError: an optimizer of another make.
    """
    inner = optimizer
    while hasattr(inner, "accelerator_state"):  # accelerate's
        inner = inner.optimizer
    if hasattr(inner, "single_partition_of_fp32_groups"):
        return Zero12(inner)
    if hasattr(inner, "fp32_partitioned_groups_flat"):
        return Zero3(inner, dist.rank())
    if isinstance(inner, Optimizer):
        return Whole(inner)
    raise UserError(
        f"optimizer {type(inner).__name__}: topology updates know torch's Adam, AdamW and SGD, accelerate's wrapper of "
        "them, and DeepSpeed's ZeRO 1 to 3; use one of those"
    )


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers whose state cannot be reset link by link.

    Raises:
        UserError: naming the optimizer and the unknown state.
    """
    for state in optimizer.state.values():
        unknown = {key for key, value in state.items() if key not in MOMENTS | _COUNTERS and value is not None}
        if unknown:
            raise UserError(
                f"optimizer {type(optimizer).__name__} keeps {sorted(unknown)}, which topology updates cannot reset; "
                "use Adam, AdamW or SGD"
            )


def _write_fragment(part: Fragment | None, changed: Tensor, index: Tensor, values: Tensor) -> None:
    if part is None:
        return
    device = part.master.device  # the CPU where the optimizer is offloaded
    changed = changed[part.start : part.stop].to(device)
    part.master.masked_fill_(changed, 0)
    inside = (index >= part.start) & (index < part.stop)
    part.master[(index[inside] - part.start).to(device)] = values[inside].to(part.master)
    for moment in part.moments.values():
        moment.masked_fill_(changed, 0)


def _working_piece(parameter: Any, part: Fragment) -> Tensor:
    return parameter.ds_tensor.data.view(-1).narrow(0, 0, part.master.numel())


def _is_whole(parameter: Any) -> bool:
    """Whether the parameter's own data are here now, besides its piece."""
    return parameter.ds_status.name == "AVAILABLE"


def _step(optimizer: Optimizer) -> float | None:
    counters: Iterable[Mapping[str, Any]] = optimizer.state.values()
    return max((float(state["step"]) for state in counters if "step" in state), default=None)


def _make_moments(optimizer: Optimizer, tensors: Iterable[Tensor], keys: Iterable[str], step: float) -> None:
    keys = list(keys)
    for tensor in tensors:
        state: dict[str, Tensor] = {key: torch.zeros_like(tensor) for key in keys}
        state["step"] = torch.tensor(step, dtype=torch.float32, device=tensor.device)
        optimizer.state[tensor] = state
