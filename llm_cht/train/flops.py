"""FLOPs of a training run, counted as a sparse machine would need them, so that methods compare at equal cost.

The convention of the PaLM paper (appendix B): 2 per weight and token forward, 4 backward, attention without the causal
half. A sparse layer counts its existing links; the products that a method asks for beyond them (the dense gradient of a
step before an update, or of every step under SNFS; the link predictors) are added. Today's devices save none of it:
MFU is counted from the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Flops:
    """The count of one model."""

    dense_per_token: int
    """of the unmodified model, forward and backward"""
    positions: int
    """in its sparse layers, existing and missing links"""

    def of_step(self, tokens: int, links: int, dense_gradient: bool) -> float:
        """FLOPs of one optimizer step on ``tokens`` targets while ``links`` exist.

        A link costs 2 forward, 2 for the gradient of its input and 2 for that of its weight; the last is paid for
        every position where the dense gradient is taken.
        """
        weight_gradients = self.positions if dense_gradient else links
        return float(tokens) * (self.dense_per_token - 6 * self.positions + 4 * links + 2 * weight_gradients)


def training_flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """FLOPs of forward and backward per trained token of the dense model.

    6 N + 12 * layers * hidden * sequence_length. N counts the parameters used in products: all but the input embedding,
    which is looked up; an embedding tied to the output layer counts, as that layer. Attention is not halved for
    causality, and recomputation is not counted.
    """
    config: Any = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        parameters -= embedding.weight.numel()
    return 6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * sequence_length


class PairFlops:
    pass


def pair_flops(model, layers):
    return PairFlops()
