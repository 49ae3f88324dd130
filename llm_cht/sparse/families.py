"""A row per model family: which projections become sparse, and which of their neurons belong together.

Surgery asks here for the layers to swap and for the groups that are evolved (and percolated) together. A new family is
a row, not code. Rejected: finding the structure by tracing the model, which is slower and cannot know that rotary
embeddings tie rows into pairs.
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
    """Names of the projections inside their parent module."""

    attention: tuple[str, str, str, str]
    """query, key, value, output"""
    mlp: tuple[tuple[str, ...], str]
    """projections into the hidden dimension, projection out of it"""
    rotary: bool
    """rotary embeddings pair rows i and i + head_dim / 2 of query and key"""

    @property
    def layers(self) -> frozenset[str]:
        """Last name parts of all layers to swap."""
        return frozenset((*self.attention, *self.mlp[0], self.mlp[1]))


FAMILIES: dict[str, Family] = {
    "llama": Family(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp=(("gate_proj", "up_proj"), "down_proj"),
        rotary=True,
    ),
}


def groups_of(model: nn.Module, family: Family | None, layers: Iterable[str]) -> tuple[Group, ...]:
    """The swapped ``layers`` (full names) in groups that are evolved together, in the order of the model.

    Layers of one parent module form a group. A unit of percolation is formed only where all its layers are sparse;
    without a family each layer stands alone and nothing percolates.
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
            _heads(model, family, names) if family else {},
        )
        for parent, names in by_parent.items()
    )


def _units(model: nn.Module, family: Family, parent: str, present: frozenset[str]) -> tuple[Unit, ...]:
    config: Any = model.config
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    query, key, value, out = (_join(parent, name) for name in family.attention)
    gates, down = tuple(_join(parent, name) for name in family.mlp[0]), _join(parent, family.mlp[1])
    units: list[Unit] = []
    if {query, key} <= present and not _normalised(model.get_submodule(parent)):
        pairing = "rotary" if family.rotary else "position"
        units.append(QueryKey(query, key, num_heads, num_kv_heads, pairing))
    if {value, out} <= present:
        units.append(ValueOutput(value, out, num_heads, num_kv_heads))
    if {*gates, down} <= present and _keeps_zero(config.hidden_act):
        units.append(Mlp(gates, down))
    return tuple(units)


def _heads(model: nn.Module, family: Family, names: Iterable[str]) -> dict[str, int]:
    """Heads of the query, key and value layers among ``names``."""
    config: Any = model.config
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    query, key, value, _ = family.attention
    heads = {query: config.num_attention_heads, key: num_kv_heads, value: num_kv_heads}
    return {name: heads[last] for name in names if (last := name.rpartition(".")[2]) in heads}


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _normalised(attention: nn.Module) -> bool:
    """Whether query and key are normalised per head: a dead pair then still counts in the norm of the others."""
    return hasattr(attention, "q_norm") or hasattr(attention, "k_norm")


def _keeps_zero(activation: str) -> bool:
    """Whether act(0) = 0, without which a hidden neuron with no inputs still sends a signal."""
    return bool(ACT2FN[activation](torch.zeros((), device="cpu")) == 0)
