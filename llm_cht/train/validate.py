"""Validation perplexity, weighted by tokens: the exponential of the summed cross-entropy over the predicted tokens.

Many ranks take the batches in turn. All of them make the same number of forward passes, because under ZeRO 3 each pass
is a collective: in the last turn a rank without a batch repeats the first one's, and its result does not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from llm_cht import dist
from llm_cht.train.engine import Engine
from llm_cht.train.task import Inputs, Task


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


@torch.no_grad()
def validate(model: nn.Module, batches: Iterable[Inputs], engine: Engine, task: Task) -> Validation:
    """Cross-entropy of ``model`` over ``batches``, which all ranks give alike; training mode is restored."""
    training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for batch, counts in _own(batches):
        targets = task.count_targets(batch)
        inputs = {key: value.to(engine.device) for key, value in batch.items()}
        with engine.autocast():
            loss = task.cross_entropy(model, inputs, targets)
        if counts:
            total += loss.item() * targets
            num_tokens += targets
    model.train(training)
    total, all_tokens = dist.total([total, num_tokens])
    return Validation(total / all_tokens, int(all_tokens))


def _own(batches: Iterable[Inputs]) -> Iterator[tuple[Inputs, bool]]:
    """This rank's batches, and whether they count."""
    rest = iter(batches)
    while turn := list(itertools.islice(rest, dist.world_size())):
        counts = dist.rank() < len(turn)
        yield turn[dist.rank() if counts else 0], counts
