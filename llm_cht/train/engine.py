"""Start of accelerate, the device, and the precision of forward passes; everything that a launcher decides is checked.

accelerate is asked for no mixed precision of its own: its wrapper would copy the logits to fp32 a second time. The
forward pass runs under ``torch.autocast`` instead, over fp32 parameters, which then are the master weights.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator, DistributedType

from llm_cht.errors import UserError

Precision = Literal["bf16", "fp32", "pure_bf16"]


@dataclass(frozen=True)
class Engine:
    """Where and in which precision a run trains."""

    accelerator: Accelerator
    precision: Precision

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of every forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def model_dtype(self) -> torch.dtype:
        """Precision in which parameters and moments are held."""
        return torch.bfloat16 if self.precision == "pure_bf16" else torch.float32


def start_engine(device: Literal["auto", "cpu", "cuda"], precision: Precision, accumulation_steps: int) -> Engine:
    """Start accelerate on ``device``.

    Raises:
        UserError: CUDA is asked for where there is none, or more than one process was started.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("`train.device` = cuda: torch sees no CUDA device here; use `--train.device cpu` or auto")
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=device == "cpu" or not torch.cuda.is_available(),
        gradient_accumulation_steps=accumulation_steps,
    )
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise UserError(
            f"the launcher sets {accelerator.gradient_accumulation_steps} gradient accumulation steps, the run needs "
            f"{accumulation_steps} (`train.batch_size` / `train.micro_batch_size`); "
            "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )
    if accelerator.distributed_type is not DistributedType.NO and accelerator.num_processes == 1:
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}; this version trains without: "
            "`accelerate launch --num_processes 1 ...` or `llm-cht train ...`"
        )
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes were started; this version trains on one: "
            "`accelerate launch --num_processes 1 ...` or `llm-cht train ...`"
        )
    return Engine(accelerator, precision)
