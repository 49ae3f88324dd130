"""Adam and AdamW of torch, with weight decay on matrices only.

Rejected: optimizers whose state is not one number per weight (Adafactor, 8-bit): a topology update could not reset the
moments of a single link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llm_cht.errors import UserError


@dataclass
class OptimizerSettings:
    """The optimizer."""

    name: Literal["adam", "adamw"] = "adam"
    """adamw decouples the weight decay."""
    lr: float = 3e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """On matrices; biases and norms have none."""

    def check(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.lr < math.inf:
            raise UserError(f"`optimizer.lr` = {self.lr}: must be above 0 and finite")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"`optimizer.{key}` = {getattr(self, key)}: must lie in [0, 1)")
        for key in ("eps", "weight_decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"`optimizer.{key}` = {getattr(self, key)}: must be finite and not negative")


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters of ``model``."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    betas = (settings.beta1, settings.beta2)
    return kind([g for g in groups if g["params"]], lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
