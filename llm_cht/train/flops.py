"""FLOPs of a training run, counted as a sparse machine would need them, so that methods compare at equal cost.

The convention of the PaLM paper (appendix B): 2 per weight and token forward, 4 backward, attention without the causal
half. A sparse layer counts its existing links; the products that a method asks for beyond them (the dense gradient of a
step before an update, or of every step under SNFS; the link predictors) are added. Today's devices save none of it:
MFU is counted from the dense model.

In a translation model the encoder and the keys and values of cross-attention work on source tokens, all the rest on
target tokens; padding counts nowhere. The links of each side are taken at the density of the whole model, which differs
from the exact count only where layers have densities of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from llm_cht.sparse.families import FAMILIES, sees_source


@dataclass(frozen=True)
class Flops:
    """The count of one language model."""

    dense_per_token: int
    """of the unmodified model, forward and backward"""
    positions: int
    """in its sparse layers, existing and missing links"""

    def of_step(self, tokens: int, links: int, dense_gradient: bool) -> float:
        """FLOPs of one optimizer step on ``tokens`` targets while ``links`` exist.

        A link costs 2 forward, 2 for the gradient of its input and 2 for that of its weight; the last is paid for
        every position where the dense gradient is taken.
        """
        return self.of_dense(tokens) + tokens * _of_links(self.positions, links, dense_gradient)

    def of_dense(self, tokens: int) -> float:
        """FLOPs of the unmodified model for a step on ``tokens`` targets."""
        return float(tokens) * self.dense_per_token


class PairTokens(Protocol):
    """What a global batch of sentence pairs holds; S and T are the lengths of a pair, sums go over all pairs."""

    @property
    def source(self) -> int:
        """Sum of S."""

    @property
    def target(self) -> int:
        """Sum of T."""

    @property
    def source_squares(self) -> int:
        """Sum of S ** 2."""

    @property
    def target_squares(self) -> int:
        """Sum of T ** 2."""

    @property
    def products(self) -> int:
        """Sum of S * T."""


@dataclass(frozen=True)
class PairFlops:
    """The count of one translation model; source and target say which tokens a weight is multiplied with."""

    source_weights: int
    target_weights: int
    source_positions: int
    """of the sparse layers, existing and missing links"""
    target_positions: int
    encoder_width: int
    """sum over the attentions of the encoder of heads * head dimension"""
    decoder_width: int
    """the same of the decoder, self-attention and cross-attention each"""

    @property
    def positions(self) -> int:
        """In all sparse layers."""
        return self.source_positions + self.target_positions

    def of_step(self, tokens: PairTokens, links: int, dense_gradient: bool) -> float:
        """FLOPs of one optimizer step on ``tokens`` while ``links`` exist in all; see ``Flops.of_step``."""
        flops = self.of_dense(tokens)
        density = links / self.positions if self.positions else 1.0
        for count, positions in ((tokens.source, self.source_positions), (tokens.target, self.target_positions)):
            flops += count * _of_links(positions, density * positions, dense_gradient)
        return flops

    def of_dense(self, tokens: PairTokens) -> float:
        """FLOPs of the unmodified model for a step on ``tokens``."""
        weights = tokens.source * self.source_weights + tokens.target * self.target_weights
        attended = self.encoder_width * tokens.source_squares
        attended += self.decoder_width * (tokens.target_squares + tokens.products)
        return float(6 * weights + 12 * attended)


def _of_links(positions: int, links: float, dense_gradient: bool) -> float:
    """FLOPs a token of sparse layers beyond those of dense ones (below 0)."""
    return 4 * links + 2 * (positions if dense_gradient else links) - 6 * positions


def training_flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """FLOPs of forward and backward per trained token of the dense language model.

    6 N + 12 * layers * heads * head dimension * sequence_length. N counts the parameters used in products: all but
    embeddings (of tokens and positions), which are looked up; the output layer counts, tied or not. Attention is not
    halved for causality or cut to a sliding window, and recomputation is not counted.
    """
    config: Any = model.config
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(parameter) for module in tables for parameter in module.parameters()}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    looked_up -= {id(parameter) for parameter in head.parameters()}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
    return 6 * parameters + 12 * config.num_hidden_layers * _width(config) * sequence_length


def pair_flops(model: nn.Module, sparse: Mapping[str, int]) -> PairFlops:
    """What is to count in a translation model, given the positions of its sparse layers by full name.

    Weights are all parameters but embeddings, as in ``training_flops_per_token``; the output layer counts, tied or not.
    In a family without a row, the keys and values of cross-attention count with the target.
    """
    config: Any = model.config
    family = FAMILIES.get(config.model_type)
    weights, positions = {True: 0, False: 0}, {True: 0, False: 0}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            weights[sees_source(family, name)] += sum(p.numel() for p in module.parameters(recurse=False))
    for name, count in sparse.items():
        positions[sees_source(family, name)] += count
    width = _width(config)
    layers = config.num_hidden_layers
    decoder_layers = getattr(config, "decoder_layers", getattr(config, "num_decoder_layers", layers))
    return PairFlops(
        *(weights[True], weights[False], positions[True], positions[False]),
        encoder_width=layers * width,
        decoder_width=decoder_layers * width,
    )


def _width(config: Any) -> int:
    """Heads * head dimension, which need not be the hidden size."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim
