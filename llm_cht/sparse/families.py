"""A row per model family: which projections become sparse, and which of their neurons belong together.

Surgery asks here for the layers to swap and for the groups that are evolved (and percolated) together. A new family is
a row, not code. A row names projections by the end of their full name; what is before it, the *base*, is the block that
they belong to: ``self_attn.q_proj`` and ``self_attn.o_proj`` would have the layer as their base, ``q_proj`` and
``o_proj`` have its attention. Projections of one base form a group, so a block whose parts lie in several modules
(BERT's) is described like any other. A *fused* layer, which makes several things at once (query, key and value; gate
and up), is one sparse layer with one graph and one number of links, and its parts are rows of it: percolation sees
parts, removal and regrowth the layer.

What the model says itself is read from it: heads, activation, how many rows rotary embeddings mix, whether query and
key are normalised. T5's relative positions are added to the logits of attention, so its queries and keys pair row by
row, as where positions are added to the embeddings.

A model without a row is swapped by a plain rule (``block_linears``), its layers stand alone and nothing percolates.

Rejected: finding the structure by tracing the model, which is slower and cannot know that rotary embeddings tie rows
into pairs; splitting fused layers into several, which stock ``transformers`` would not load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from llm_cht.sparse.linear import num_outputs
from llm_cht.topology.percolate import Group, Mlp, QueryKey, Rows, Unit, ValueOutput


@dataclass(frozen=True)
class Fused:
    """A layer that makes several things at once."""

    parts: tuple[str, ...]
    """in the order of its rows"""
    by_head: bool = False
    """The rows of a head stand together, part after part; else the rows of a part, head after head."""


@dataclass(frozen=True)
class Family:
    """Names of the projections, below their base, and the keys of the config that say how they work.

    Part ``p`` of a fused layer ``x`` is named ``x/p``.
    """

    attention: tuple[str, str, str, str]
    """query, key, value, output"""
    mlps: tuple[tuple[tuple[str, ...], str], ...]
    """projections into the hidden dimension, and the one out of it; one entry for each form that models of the family
    have (T5's plain and gated one)"""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    rotary: bool = False
    """rotary embeddings pair rows i and i + rotary_dim / 2 of the heads of query and key"""
    activation: str = "hidden_act"
    """key of the activation between the projections of an MLP"""
    decoder_heads: str | None = None
    """key of the attention heads of a stack named `decoder`, where it is another than `num_attention_heads`"""
    cross: str | None = None
    """name of the attention of a decoder over the encoder's outputs"""
    left_out: str | None = None
    """name of a module whose layers are named like the family's and are made otherwise; they stay dense"""

    @property
    def layers(self) -> frozenset[str]:
        """Ends of the names of all layers to swap."""
        names = (*self.attention, *(name for gates, out in self.mlps for name in (*gates, out)))
        return frozenset(name.partition("/")[0] for name in names)

    def base(self, name: str) -> str | None:
        """What stands before one of the family's projections in a full name; None if it ends with none of them."""
        if self.left_out in name.split("."):
            return None
        return next((f".{name}".removesuffix(f".{end}")[1:] for end in self.layers if _ends(name, end)), None)


_LLAMA = Family(
    attention=("q_proj", "k_proj", "v_proj", "o_proj"), mlps=((("gate_proj", "up_proj"), "down_proj"),), rotary=True
)
_MARIAN = Family(
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    mlps=((("fc1",), "fc2"),),
    activation="activation_function",
    decoder_heads="decoder_attention_heads",
    cross="encoder_attn",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "olmo2"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), replace(_LLAMA, activation="hidden_activation")),
    "phi3": Family(
        attention=("qkv_proj/query", "qkv_proj/key", "qkv_proj/value", "o_proj"),
        mlps=((("gate_up_proj/gate", "gate_up_proj/up"), "down_proj"),),
        fused={"qkv_proj": Fused(("query", "key", "value")), "gate_up_proj": Fused(("gate", "up"))},
        rotary=True,
    ),
    "gpt_neox": Family(
        attention=("query_key_value/query", "query_key_value/key", "query_key_value/value", "dense"),
        mlps=((("dense_h_to_4h",), "dense_4h_to_h"),),
        fused={"query_key_value": Fused(("query", "key", "value"), by_head=True)},
        rotary=True,
    ),
    "opt": replace(_MARIAN, decoder_heads=None, cross=None),
    "bert": Family(
        attention=("self.query", "self.key", "self.value", "output.dense"),
        mlps=((("intermediate.dense",), "output.dense"),),
    ),
    "gpt2": Family(
        attention=("c_attn/query", "c_attn/key", "c_attn/value", "c_proj"),
        mlps=((("c_fc",), "c_proj"),),
        fused={"c_attn": Fused(("query", "key", "value"))},
        activation="activation_function",
        left_out="crossattention",  # its c_attn makes keys and values alone
    ),
    **dict.fromkeys(("marian", "bart"), _MARIAN),
    "t5": Family(
        attention=("q", "k", "v", "o"),
        mlps=((("wi",), "wo"), (("wi_0", "wi_1"), "wo")),
        activation="dense_act_fn",
        cross="EncDecAttention",
    ),
}


def is_linear(module: nn.Module) -> bool:
    """Linear layers of any make, also those that cannot be swapped, so that they are refused and not overlooked."""
    return isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def block_linears(model: nn.Module) -> frozenset[str]:
    """Full names of the linear layers inside the blocks of any model: below an entry of an ``nn.ModuleList``.

    The output layer is none of them, wherever it is.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return frozenset(
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        # LIST.3.x, but not LIST.3: a list of layers is no list of blocks (it may hold output layers)
        and any(name.startswith(f"{above}.") and "." in name.removeprefix(f"{above}.") for above in lists)
    )


def groups_of(model: nn.Module, family: Family | None, layers: Iterable[str]) -> tuple[Group, ...]:
    """The swapped ``layers`` (full names) in groups that are evolved together, in the order of the model.

    Layers with one base form a group: an attention (cross-attention too) or an MLP. A unit of percolation is formed
    only where all its layers are sparse; a layer that is none of the family's stands alone, and nothing percolates.
    """
    by_base: dict[str, list[str]] = {}
    alone = set()
    for name in layers:
        base = family.base(name) if family else None
        if base is None:
            alone.add(name)
        by_base.setdefault(name if base is None else base, []).append(name)
    return tuple(
        Group(base, tuple(names), ()) if family is None or base in alone else _group(model, family, base, names)
        for base, names in by_base.items()
    )


def sees_source(family: Family | None, name: str) -> bool:
    """Whether a module of an encoder-decoder model works on source tokens: the encoder, keys and values made of it."""
    parts = name.split(".")
    crossing = family is not None and family.cross in parts and parts[-1] in family.attention[1:3]
    return "encoder" in parts or crossing


def _group(model: nn.Module, family: Family, base: str, names: list[str]) -> Group:
    num_heads, num_kv_heads = _num_heads(model.config, family, base)
    query, key, value, _ = family.attention
    heads = {query: num_heads, key: num_kv_heads, value: num_kv_heads}
    parts: dict[str, Rows] = {}
    heads_of: dict[str, int] = {}
    for name in names:
        end = name.removeprefix(f"{base}.")
        fused = family.fused.get(end)
        if fused is not None:
            ends = [f"{end}/{part}" for part in fused.parts]
            shares = [1 if fused.by_head else heads.get(part, 1) for part in ends]
            cuts = _cut(model, name, num_heads if fused.by_head else 1, shares)
            parts |= dict(zip((_join(base, part) for part in ends), cuts, strict=True))
            if query in ends:
                heads_of[name] = sum(heads[part] for part in ends)
        elif end in heads:
            heads_of[name] = heads[end]
    units = _units(model, family, base, frozenset([*names, *parts]))
    return Group(base, tuple(names), units, heads_of, parts)


def _cut(model: nn.Module, name: str, blocks: int, shares: list[int]) -> list[Rows]:
    """The parts of a fused layer, each with its share of the rows of every block."""
    height = num_outputs(model.get_submodule(name)) // blocks // sum(shares)
    bounds = [height * sum(shares[:i]) for i in range(len(shares) + 1)]
    return [Rows(name, blocks, *pair) for pair in pairwise(bounds)]


def _units(model: nn.Module, family: Family, base: str, present: frozenset[str]) -> tuple[Unit, ...]:
    config: Any = model.config
    num_heads, num_kv_heads = _num_heads(config, family, base)
    query, key, value, out = (_join(base, name) for name in family.attention)
    units: list[Unit] = []
    if {query, key} <= present and not _normalised(model.get_submodule(base)):
        pairing = "rotary" if family.rotary else "position"
        units.append(QueryKey(query, key, num_heads, num_kv_heads, pairing, _rotary_dim(config, family)))
    if {value, out} <= present:
        units.append(ValueOutput(value, out, num_heads, num_kv_heads))
    for into, last in family.mlps:
        gates, out = tuple(_join(base, name) for name in into), _join(base, last)
        if {*gates, out} <= present and _keeps_zero(getattr(config, family.activation)):
            units.append(Mlp(gates, out))
    return tuple(units)


def _num_heads(config: Any, family: Family, base: str) -> tuple[int, int]:
    """Query heads and key/value heads of the attention ``base``."""
    key = family.decoder_heads if "decoder" in base.split(".") else None
    num_heads = getattr(config, key or "num_attention_heads")
    return num_heads, getattr(config, "num_key_value_heads", None) or num_heads


def _rotary_dim(config: Any, family: Family) -> int | None:
    """Rows of a head that rotary embeddings mix; None: all."""
    rope = (getattr(config, "rope_parameters", None) or {}) if family.rotary else {}
    factor = rope.get("partial_rotary_factor") or 1.0
    if factor == 1.0:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * factor)
    return dim + dim % 2


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _join(base: str, name: str) -> str:
    return f"{base}.{name}" if base else name


def _normalised(attention: nn.Module) -> bool:
    """Whether query and key are normalised per head: a dead pair then still counts in the norm of the others."""
    return hasattr(attention, "q_norm") or hasattr(attention, "k_norm")


def _keeps_zero(activation: str) -> bool:
    """Whether act(0) = 0, without which a hidden neuron with no inputs still sends a signal."""
    return bool(ACT2FN[activation](torch.zeros((), device="cpu")) == 0)
