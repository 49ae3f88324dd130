"""Percolation: links that no signal can pass, because a neuron lost its inputs or its outputs, are removed.

A unit is a hidden dimension between layers: it knows which of its neurons are dead and which links those hold. The
rules are exact: the function of the model does not change, but for ``pairing='position'`` under rotary embeddings.
Dimensions of the residual stream belong to no unit. A layer that makes several things at once (query, key and value) is
cut into them for percolation, and only for it. Rejected: a walk over the graph of all layers, which would have to
rediscover heads, groups and rotary pairs that the model family knows.

Letters in names: O outputs and I inputs of a layer, H query heads, K key/value heads, D positions of a head (pairs of
them under rotary embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]
"""layer name -> bool (out, in)"""


@dataclass(frozen=True)
class Mlp:
    """Hidden neurons of an MLP: dead with an empty row in any projection in, or an empty column in the one out.

    The activation must have act(0) = 0.
    """

    gates: tuple[str, ...]
    """layers into the hidden dimension: (fc1,), or (gate, up), whose outputs are multiplied"""
    out: str
    """layer out of it"""

    def dead(self, masks: Masks, has_bias: frozenset[str]) -> Tensor:
        """Which neurons are dead, bool (hidden,)."""
        dead = _empty_columns(masks[self.out])
        for gate in self.gates:
            dead = dead | _empty_rows(masks, gate, has_bias)
        return dead

    def links(self, dead: Tensor) -> dict[str, Tensor]:
        """The positions of dead neurons in each layer, bool, broadcastable to its mask."""
        return dict.fromkeys(self.gates, dead[:, None]) | {self.out: dead[None, :]}


@dataclass(frozen=True)
class ValueOutput:
    """Value rows and the output columns they feed: one column in each query head of the row's group.

    A neuron is a value row, so a model with fewer key/value heads has fewer neurons. It is dead when its row is empty
    or when all columns that it feeds are.
    """

    value: str
    out: str
    num_heads: int
    num_kv_heads: int

    def dead(self, masks: Masks, has_bias: frozenset[str]) -> Tensor:
        """Which neurons are dead, bool (num_kv_heads, head_dim)."""
        group = self.num_heads // self.num_kv_heads
        rows_KD = _empty_rows(masks, self.value, has_bias).view(self.num_kv_heads, -1)
        return rows_KD | _empty_columns(masks[self.out]).view(self.num_kv_heads, group, -1).all(1)

    def links(self, dead: Tensor) -> dict[str, Tensor]:
        """The positions of dead neurons in each layer, bool, broadcastable to its mask."""
        columns_HD = dead.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)
        return {self.value: dead.flatten()[:, None], self.out: columns_HD.flatten()[None, :]}


@dataclass(frozen=True)
class QueryKey:
    """Query rows and the key rows they are multiplied with.

    A neuron is one term of the sum that makes an attention logit: a position of a query head, or the rotary pair
    (i, i + rotary_dim / 2), which the embedding mixes and which is empty only when both rows are (behind rotary_dim a
    neuron is a position again). It is dead when its query or its key rows are empty. Key rows serve every query head of
    their group and go when dead in all of them.
    """

    query: str
    key: str
    num_heads: int
    num_kv_heads: int
    pairing: str
    """'rotary', or 'position' (row by row; with rotary embeddings this changes the logits)"""

    rotary_dim: int | None = None
    """rows at the front of every head that rotary embeddings mix; None: all"""

    def dead(self, masks: Masks, has_bias: frozenset[str]) -> Tensor:
        """Which neurons are dead, bool (num_heads, neurons): the rotary pairs of a head, then its single positions."""
        query_HD = self._neurons(_empty_rows(masks, self.query, has_bias).view(self.num_heads, -1))
        key_KD = self._neurons(_empty_rows(masks, self.key, has_bias).view(self.num_kv_heads, -1))
        return query_HD | key_KD.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)

    def links(self, dead: Tensor) -> dict[str, Tensor]:
        """The positions of dead neurons in each layer, bool, broadcastable to its mask."""
        dead_KD = dead.view(self.num_kv_heads, self.num_heads // self.num_kv_heads, -1).all(1)
        return {self.query: self._rows(dead), self.key: self._rows(dead_KD)}

    def _neurons(self, rows: Tensor) -> Tensor:
        """From rows (heads, head_dim) to neurons, which have a property when all their rows have."""
        if self.pairing == "position":
            return rows
        paired = rows.shape[1] if self.rotary_dim is None else self.rotary_dim
        pairs = rows[:, :paired].unflatten(1, (2, paired // 2)).all(1)
        return torch.cat([pairs, rows[:, paired:]], dim=1)

    def _rows(self, neurons: Tensor) -> Tensor:
        """From neurons (heads, neurons) to the rows of the layer, (out, 1)."""
        pairs = {"position": 0, "rotary": neurons.shape[1] if self.rotary_dim is None else self.rotary_dim // 2}
        first = neurons[:, : pairs[self.pairing]]
        return torch.cat([first, neurons], dim=1).reshape(-1, 1)


@dataclass(frozen=True)
class Heads:
    """Whole heads, besides their single neurons: one whose values reach no output needs no queries and no keys.

    A key head goes when all query heads of its group are dead. Adds no neurons to those that are counted.
    """

    attention: QueryKey
    values: ValueOutput

    def dead(self, masks: Masks, has_bias: frozenset[str]) -> Tensor:
        """Which query rows belong to dead heads, bool (num_heads, head_dim)."""
        num_heads, num_kv_heads = self.values.num_heads, self.values.num_kv_heads
        rows_KD = _empty_rows(masks, self.values.value, has_bias).view(num_kv_heads, -1)
        columns_HD = _empty_columns(masks[self.values.out]).view(num_heads, -1)
        dead_H = (rows_KD.repeat_interleave(num_heads // num_kv_heads, dim=0) | columns_HD).all(1)
        return dead_H[:, None].expand(-1, len(masks[self.attention.query]) // num_heads)

    def links(self, dead: Tensor) -> dict[str, Tensor]:
        """The positions of dead heads in each layer, bool, broadcastable to its mask."""
        num_kv_heads = self.values.num_kv_heads
        dead_KD = dead.reshape(num_kv_heads, -1, dead.shape[1]).all(1)
        return {self.attention.query: dead.flatten()[:, None], self.attention.key: dead_KD.flatten()[:, None]}


Unit = Mlp | ValueOutput | QueryKey | Heads


def with_dead_heads(units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The units of an attention and its whole heads, where both kinds of them are there."""
    attention = next((unit for unit in units if isinstance(unit, QueryKey)), None)
    values = next((unit for unit in units if isinstance(unit, ValueOutput)), None)
    return units if attention is None or values is None else (*units, Heads(attention, values))


@dataclass(frozen=True)
class Rows:
    """Some rows of a layer: of each of its ``blocks`` blocks of equal height those from ``start`` to ``stop``."""

    layer: str
    blocks: int
    start: int
    stop: int

    def of(self, mask_OI: Tensor) -> Tensor:
        """These rows of the layer's mask, bool (rows, in); those of a block follow each other."""
        return self._view(mask_OI).flatten(0, 1)

    def put(self, rows: Tensor, mask_OI: Tensor) -> None:
        """Write them into the layer's mask."""
        part = self._view(mask_OI)
        part.copy_(rows.view_as(part))

    def _view(self, mask_OI: Tensor) -> Tensor:
        return mask_OI.unflatten(0, (self.blocks, -1))[:, self.start : self.stop]


@dataclass(frozen=True)
class Group:
    """Layers that are evolved together."""

    name: str
    layers: tuple[str, ...]
    units: tuple[Unit, ...]
    """hidden dimensions between the layers; none: nothing percolates"""
    heads: Mapping[str, int] = field(default_factory=dict)
    """number of heads that the rows of a layer belong to, for query, key and value layers"""
    parts: Mapping[str, Rows] = field(default_factory=dict)
    """what units call a layer and is only some rows of one; the parts of a layer are all of it"""

    def split(self, masks: Masks) -> dict[str, Tensor]:
        """The masks as the units know them: of whole layers and, instead of a layer that has them, of its parts."""
        fused = {rows.layer for rows in self.parts.values()}
        whole = {name: masks[name] for name in self.layers if name not in fused}
        return whole | {name: rows.of(masks[rows.layer]) for name, rows in self.parts.items()}

    def join(self, split: Masks, masks: Masks) -> dict[str, Tensor]:
        """The masks of the layers, from what ``split`` made of ``masks``, which stay as they are."""
        whole = {name: split[name] if name in split else masks[name].clone() for name in self.layers}
        for name, rows in self.parts.items():
            rows.put(split[name], whole[rows.layer])
        return whole

    def biased(self, has_bias: frozenset[str]) -> frozenset[str]:
        """Layers with a bias, and their parts."""
        return has_bias | {name for name, rows in self.parts.items() if rows.layer in has_bias}


def percolate(group: Group, masks: Masks, has_bias: frozenset[str]) -> tuple[dict[str, Tensor], int, int]:
    """Remove every link of a dead neuron, until no more die (paper 002, App. F; made exact).

    Args:
        group: the units.
        masks: the group's masks by layer name; not changed.
        has_bias: layers whose outputs have a bias, so that no row of them is empty; pass none to ignore biases.

    Returns:
        The new masks of the group's layers, the number of active neurons, the number of all neurons.
    """
    new, has_bias = group.split(masks), group.biased(has_bias)
    before = None
    while before != (links := sum(int(mask.count_nonzero()) for mask in new.values())):
        before = links
        for unit in group.units:
            for name, positions in unit.links(unit.dead(new, has_bias)).items():
                new[name] = new[name] & ~positions
    dead = [unit.dead(new, has_bias) for unit in group.units if not isinstance(unit, Heads)]
    active = sum(int((~neurons).count_nonzero()) for neurons in dead)
    return group.join(new, masks), active, sum(neurons.numel() for neurons in dead)


def _empty_rows(masks: Masks, name: str, has_bias: frozenset[str]) -> Tensor:
    mask_OI = masks[name]
    return mask_OI.new_zeros(mask_OI.shape[0]) if name in has_bias else ~mask_OI.any(dim=1)


def _empty_columns(mask_OI: Tensor) -> Tensor:
    return ~mask_OI.any(dim=0)
