"""Validation perplexity, weighted by tokens: the exponential of the summed cross-entropy over the predicted tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_cht.train.engine import Engine


@dataclass(frozen=True)
class Validation:
    """Result of one validation."""

    loss: float
    """nats per predicted token"""
    num_tokens: int
    """predicted tokens"""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def count_targets(labels: Tensor) -> int:
    """Predicted tokens of a batch of labels (sequences, length): all but the first and the ignored (-100)."""
    return int((labels[:, 1:] != -100).sum())


@torch.no_grad()
def validate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], engine: Engine) -> Validation:
    """Cross-entropy of ``model`` over ``batches``; training mode is restored."""
    training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in batches:
        targets = count_targets(batch["labels"])
        inputs = {key: value.to(engine.device) for key, value in batch.items()}
        with engine.autocast():
            loss = model(**inputs, use_cache=False, num_items_in_batch=targets).loss
        total += loss.item() * targets
        num_tokens += targets
    model.train(training)
    return Validation(total / num_tokens, num_tokens)
