"""Adam and AdamW of torch, with weight decay on matrices only; and Adam with an age of its own for every link.

A new link has moments 0 but shares Adam's step counter, so that its first steps are several times the learning rate
(algorithms, section 8). The papers' cure is to warm the learning rate up again after every topology update, for all
links; the age is the other one, for the new links alone.

Rejected: optimizers whose state is not one number per weight (Adafactor, 8-bit): a topology update could not reset the
moments of a single link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    link_age: bool = False
    """Adam's bias correction by the age of each link, 0 when it is regrown; then `lr.rewarm: off` suits. Slower."""

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
    groups = [group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    decoupled = settings.name == "adamw"
    if settings.link_age:
        return AgedAdam(groups, settings.lr, betas, settings.eps, decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


class AgedAdam(torch.optim.Optimizer):
    """Adam or AdamW whose bias correction counts the steps of every element by itself.

    Equal to torch's until an age is set to 0. State: ``exp_avg``, ``exp_avg_sq`` and ``age``, all of the parameter's
    shape; ages stay exact up to 2**24 steps in fp32.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "decoupled": decoupled})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), decay = self.state[parameter], group["betas"], group["weight_decay"]
        gradient = parameter.grad
        assert gradient is not None
        for key in ("exp_avg", "exp_avg_sq", "age"):
            if key not in state:
                state[key] = torch.zeros_like(parameter)
        state["step"] = state.get("step", torch.tensor(0.0)) + 1  # as torch's: says how old the optimizer is
        if group["decoupled"]:
            parameter.mul_(1 - group["lr"] * decay)
        elif decay:
            gradient = gradient.add(parameter, alpha=decay)
        age = state["age"].add_(1)
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (square / _correction(beta2, age)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean / _correction(beta1, age), size, value=-group["lr"])


def _correction(beta: float, age: Tensor) -> Tensor:
    """1 - beta ** age, exact for small ages too; 1 where beta is 0."""
    return torch.expm1(age * math.log(beta)).neg_() if beta else torch.ones_like(age)
