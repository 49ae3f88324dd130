"""A row per model family: which projections become sparse, and which of their neurons belong together.

Surgery asks here for the layers to swap and for the groups that are evolved (and percolated) together. A new family is
a row, not code. T5's relative positions are added to the logits of attention, so its queries and keys pair row by row,
as where positions are added to the embeddings. Rejected: finding the structure by tracing the model, which is slower
and cannot know that rotary embeddings tie rows into pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from llm_cht.topology.percolate import Group, Mlp, QueryKey, Unit, ValueOutput


@dataclass(frozen=True)
class Family:
    """Names of the projections inside their parent module, and the keys of the config that say how they work."""

    attention: tuple[str, str, str, str]
    """query, key, value, output"""
    mlps: tuple[tuple[tuple[str, ...], str], ...]
    """projections into the hidden dimension, and the one out of it; one entry for each form that models of the family
    have (T5's plain and gated one)"""
    rotary: bool = False
    """rotary embeddings pair rows i and i + head_dim / 2 of query and key"""
    activation: str = "hidden_act"
    """key of the activation between the projections of an MLP"""
    decoder_heads: str | None = None
    """key of the attention heads of a stack named `decoder`, where it is another than `num_attention_heads`"""
    cross: str | None = None
    """name of the attention of a decoder over the encoder's outputs"""

    @property
    def layers(self) -> frozenset[str]:
        """Last name parts of all layers to swap."""
        return frozenset((*self.attention, *(name for gates, out in self.mlps for name in (*gates, out))))


FAMILIES: dict[str, Family] = {
    "llama": Family(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlps=((("gate_proj", "up_proj"), "down_proj"),),
        rotary=True,
    ),
    "marian": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlps=((("fc1",), "fc2"),),
        activation="activation_function",
        decoder_heads="decoder_attention_heads",
        cross="encoder_attn",
    ),
    "bart": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlps=((("fc1",), "fc2"),),
        activation="activation_function",
        decoder_heads="decoder_attention_heads",
        cross="encoder_attn",
    ),
    "t5": Family(
        attention=("q", "k", "v", "o"),
        mlps=((("wi",), "wo"), (("wi_0", "wi_1"), "wo")),
        activation="dense_act_fn",
        cross="EncDecAttention",
    ),
}


def groups_of(model: nn.Module, family: Family | None, layers: Iterable[str]) -> tuple[Group, ...]:
    """The swapped ``layers`` (full names) in groups that are evolved together, in the order of the model.

    Layers of one parent module form a group: an attention (cross-attention too) or an MLP. A unit of percolation is
    formed only where all its layers are sparse; without a family each layer stands alone and nothing percolates.
    """
    by_parent: dict[str, list[str]] = {}
    for name in layers:
        parent = name.rpartition(".")[0] if family else name
        by_parent.setdefault(parent, []).append(name)
    return tuple(
        Group(
            parent,
            tuple(names),
            _units(model, family, parent, frozenset(names)) if family else (),
            _heads(model, family, parent, names) if family else {},
        )
        for parent, names in by_parent.items()
    )


def sees_source(family: Family | None, name: str) -> bool:
    """Whether a module of an encoder-decoder model works on source tokens: the encoder, keys and values made of it."""
    parts = name.split(".")
    crossing = family is not None and family.cross in parts and parts[-1] in family.attention[1:3]
    return "encoder" in parts or crossing


def _units(model: nn.Module, family: Family, parent: str, present: frozenset[str]) -> tuple[Unit, ...]:
    config: Any = model.config
    num_heads, num_kv_heads = _num_heads(config, family, parent)
    query, key, value, out = (_join(parent, name) for name in family.attention)
    units: list[Unit] = []
    if {query, key} <= present and not _normalised(model.get_submodule(parent)):
        pairing = "rotary" if family.rotary else "position"
        units.append(QueryKey(query, key, num_heads, num_kv_heads, pairing))
    if {value, out} <= present:
        units.append(ValueOutput(value, out, num_heads, num_kv_heads))
    for into, last in family.mlps:
        gates, out = tuple(_join(parent, name) for name in into), _join(parent, last)
        if {*gates, out} <= present and _keeps_zero(getattr(config, family.activation)):
            units.append(Mlp(gates, out))
    return tuple(units)


def _heads(model: nn.Module, family: Family, parent: str, names: Iterable[str]) -> dict[str, int]:
    """Heads of the query, key and value layers among ``names``, which are in ``parent``."""
    num_heads, num_kv_heads = _num_heads(model.config, family, parent)
    query, key, value, _ = family.attention
    heads = {query: num_heads, key: num_kv_heads, value: num_kv_heads}
    return {name: heads[last] for name in names if (last := name.rpartition(".")[2]) in heads}


def _num_heads(config: Any, family: Family, parent: str) -> tuple[int, int]:
    """Query heads and key/value heads of the attention ``parent``."""
    key = family.decoder_heads if "decoder" in parent.split(".") else None
    num_heads = getattr(config, key or "num_attention_heads")
    return num_heads, getattr(config, "num_key_value_heads", None) or num_heads


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _normalised(attention: nn.Module) -> bool:
    """Whether query and key are normalised per head: a dead pair then still counts in the norm of the others."""
    return hasattr(attention, "q_norm") or hasattr(attention, "k_norm")


def _keeps_zero(activation: str) -> bool:
    """Whether act(0) = 0, without which a hidden neuron with no inputs still sends a signal."""
    return bool(ACT2FN[activation](torch.zeros((), device="cpu")) == 0)
