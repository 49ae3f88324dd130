"""Which tensors of a layer this process holds: fp32 master weight and optimizer moments.

The updater writes through here and never looks into an optimizer. On one process (and under DDP) everything is here
and whole. An optimizer state that is not known raises: skipping it silently would leave stale moments on new links.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_cht.errors import UserError

_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
_COUNTERS = frozenset({"step"})


def master(weight: Tensor) -> Tensor:
    """The weight (out, in) in fp32 as the optimizer sees it; a copy where it is held in another precision."""
    return weight.detach().float()


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers whose state cannot be reset link by link.

    Raises:
        UserError: naming the optimizer and the unknown state.
    """
    for state in optimizer.state.values():
        unknown = {key for key, value in state.items() if key not in _MOMENTS | _COUNTERS and value is not None}
        if unknown:
            raise UserError(
                f"optimizer {type(optimizer).__name__} keeps {sorted(unknown)}, which topology updates cannot reset; "
                "use Adam, AdamW or SGD"
            )


@torch.no_grad()
def reset_moments(optimizer: Optimizer, weight: Tensor, changed_OI: Tensor) -> None:
    """Zero the moments of ``weight`` where ``changed_OI`` (bool) is True; before the first step there are none."""
    for key, value in optimizer.state.get(weight, {}).items():
        if key in _MOMENTS and value is not None:
            value.masked_fill_(changed_OI, 0)
