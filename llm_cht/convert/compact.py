"""A sparse model without its inactive neurons: smaller matrices, an ordinary config that says so, the same outputs.

Percolation says which neurons pass no signal (``topology.percolate``; exact). Stock architectures have one hidden size
for all MLPs of a stack and one number of heads, so every MLP keeps as many neurons as the one with the most active
ones, and every attention loses as many heads as the one with the fewest inactive ones; the inactive neurons that stay
for that are zero. What a family cannot shrink keeps its size. Under grouped-query attention a head is a key/value
group, because all groups have the same number of queries.

Rejected: pairs of query and key rows (the size of a head decides how rotary embeddings turn and how logits are
scaled), and dimensions of the residual stream, which all layers share.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_cht.convert.masks import percolated
from llm_cht.convert.plan import Layers, check_weight, empty_model
from llm_cht.convert.shards import Edit
from llm_cht.convert.source import Source
from llm_cht.errors import UserError
from llm_cht.sparse.families import FAMILIES, Family, groups_of, is_linear
from llm_cht.sparse.linear import num_outputs, transposed_layers
from llm_cht.topology.bits import PackedMasks
from llm_cht.topology.percolate import Group, Mlp, ValueOutput


@dataclass(frozen=True)
class Sizes:
    """Which sizes of a family its config can make smaller."""

    hidden: str = "intermediate_size"
    """key of the neurons of an MLP; {stack} is encoder or decoder"""
    heads: bool = False
    """Whether heads may be fewer: their size is a key of its own (``head_dim``), and they share nothing."""


# T5's heads share biases by position over all layers; OLMo2 normalises all heads together; in the others without
# heads, the size of a head is the hidden size over their number.
_HEADS = Sizes(heads=True)
SIZES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "phi3"), _HEADS),
    **dict.fromkeys(("olmo2", "gpt_neox", "bert"), Sizes()),
    **dict.fromkeys(("marian", "bart"), Sizes("{stack}_ffn_dim")),
    "gpt2": Sizes("n_inner"),
    "opt": Sizes("ffn_dim"),
    "t5": Sizes("d_ff"),
}


_Dead = tuple[Group, Any, Tensor]
"""a unit whose neurons can be removed, with its group, and which of them pass no signal"""


@dataclass
class _Kept:
    """What remains of the layers of a model; all, where nothing is said."""

    model: Any
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    alive: dict[str, Tensor] = field(default_factory=dict)
    """rows that pass a signal; the bias of another row becomes 0"""

    def put(self, rows: dict[str, Tensor], group: Group, name: str, which: Tensor) -> None:
        """Say in ``rows`` which neurons or heads of a layer, or of a part of one, remain."""
        part = group.parts.get(name)
        layer = name if part is None else part.layer
        size = num_outputs(self.model.get_submodule(layer))
        index = torch.arange(size)[:, None]
        index = (index if part is None else part.of(index)).squeeze(1)
        every = which.repeat_interleave(len(index) // len(which))
        rows.setdefault(layer, torch.ones(size, dtype=torch.bool))[index] = every

    def edits(self, masks: PackedMasks, transposed: frozenset[str]) -> dict[str, Edit]:
        """The same for the tensors of the checkpoint, which become 0 off ``masks``, stored as they are."""
        edits = {}
        for name in masks.keys() | self.rows.keys() | self.columns.keys():
            rows, columns, alive = self.rows.get(name), self.columns.get(name), self.alive.get(name)
            mask = partial(masks.__getitem__, name) if name in masks else None
            edits[f"{name}.weight"] = Edit(mask, columns, rows) if name in transposed else Edit(mask, rows, columns)
            if getattr(self.model.get_submodule(name), "bias", None) is not None:
                edits[f"{name}.bias"] = Edit(None if alive is None else partial(torch.clone, alive), rows)
        return edits


@dataclass(frozen=True)
class Compact:
    """How a checkpoint becomes smaller."""

    edits: dict[str, Edit]
    masks: PackedMasks
    """in the order of the stored weights, as those of the checkpoint"""
    config: dict[str, Any]
    report: str
    transposed: frozenset[str]
    """layers whose weight is stored as (in, out)"""


def compact(source: Source, config: Any, masks: PackedMasks) -> Compact:
    """Plan the removal of all inactive neurons of a sparse checkpoint that can be removed.

    Raises:
        UserError: the family has no row, or nothing can be removed.
    """
    kind = source.config["model_type"]
    family, sizes = FAMILIES.get(kind), SIZES.get(kind)
    if family is None or sizes is None:
        raise UserError(f"--compact: it is not known what model type `{kind}` can lose; known: {', '.join(SIZES)}")
    model = empty_model(config, code=False)
    for name in masks:
        check_weight(source, name, masks.shapes[name])
    biased = frozenset(name for name in masks if getattr(model.get_submodule(name), "bias", None) is not None)
    transposed = transposed_layers(model)
    networks = masks.transposed(transposed)
    layers = Layers(dict(networks.shapes), groups_of(model, family, list(masks)), biased, transposed)
    networks, active, neurons = percolated(networks, layers, heads=True)
    kept, changes, before = _Kept(model), {}, {}
    mlps, values = _dead(layers, networks, Mlp), _dead(layers, networks, ValueOutput)
    for key, found in _by_size(mlps, sizes, _missing(model, family, mlps, Mlp)).items():
        width, full = _shrink_mlps(kept, found), len(found[0][2])
        if width < full:
            changes[key], before[key] = width, full
    if sizes.heads and not _missing(model, family, values, ValueOutput) and (fewer := _fewer_heads(config, values)):
        _shrink_attentions(kept, family, values, fewer)
        changes |= _head_keys(config, fewer)
    if not changes:
        raise UserError(
            f"--compact: nothing to remove ({active:,} of {neurons:,} neurons are active): of each size that a {kind} "
            "has once for all layers, some layer needs all, or the family cannot have less; keep the folder as it is"
        )
    masks = networks.transposed(transposed)
    edits, smaller = kept.edits(masks, transposed), source.config | changes
    _check_shapes(source, empty_model(type(config).from_dict(copy.deepcopy(smaller)), code=False), edits)
    small = PackedMasks.of((name, _cut(masks[name], edits[f"{name}.weight"])) for name in masks)
    sizes_told = [f"{key} {before.get(key, getattr(config, key, None))} -> {value}" for key, value in changes.items()]
    report = f"{active:,} of {neurons:,} neurons are active; {', '.join(sizes_told)}"
    return Compact(edits, small, smaller, report, transposed)


def _dead(layers: Layers, masks: PackedMasks, kind: type) -> list[_Dead]:
    found: list[_Dead] = []
    for group in layers.groups:
        units = [unit for unit in group.units if isinstance(unit, kind)]
        split = group.split({name: masks[name] for name in group.layers}) if units else {}
        found += [(group, unit, unit.dead(split, group.biased(layers.biased))) for unit in units]
    return found


def _missing(model: Any, family: Family, found: list[_Dead], kind: type) -> set[str]:
    """Last layers of the units that there would be if all layers of the family were sparse, and are not."""
    every = [name for name, module in model.named_modules() if is_linear(module) and family.base(name) is not None]
    units: list[Any] = [u for group in groups_of(model, family, every) for u in group.units if isinstance(u, kind)]
    return {unit.out for unit in units} - {unit.out for _, unit, _ in found}


def _by_size(mlps: list[_Dead], sizes: Sizes, missing: set[str]) -> dict[str, list[_Dead]]:
    """MLPs by the key of their size, where all that it stands for are known."""

    def key(name: str) -> str:
        return sizes.hidden.format(stack="decoder" if "decoder" in name.split(".") else "encoder")

    found: dict[str, list[_Dead]] = {}
    for one in mlps:
        found.setdefault(key(one[1].out), []).append(one)
    return {size: some for size, some in found.items() if size not in map(key, missing)}


def _shrink_mlps(kept: _Kept, mlps: list[_Dead]) -> int:
    """Keep in every MLP as many neurons as the one with the most active ones has; returns how many."""
    width = max(1, *(int((~gone).count_nonzero()) for _, _, gone in mlps))
    for group, unit, gone in mlps:
        stay = _with_some(~gone, width)
        for gate in unit.gates:
            kept.put(kept.rows, group, gate, stay)
            kept.put(kept.alive, group, gate, ~gone)
        kept.columns[unit.out] = stay
    return width


def _with_some(alive: Tensor, count: int) -> Tensor:
    """``alive`` and the first others, ``count`` in all."""
    stay = alive.clone()
    stay[(~alive).nonzero().squeeze(1)[: count - int(alive.count_nonzero())]] = True
    return stay


def _fewer_heads(config: Any, values: list[_Dead]) -> int:
    """How many key/value heads every attention can lose; 0 if the config takes no smaller number."""
    most = min((min(int(gone.all(1).count_nonzero()), len(gone) - 1) for _, _, gone in values), default=0)
    return next((fewer for fewer in range(most, 0, -1) if _possible(config, fewer)), 0)


def _head_keys(config: Any, fewer: int) -> dict[str, int]:
    """The keys of a config with ``fewer`` key/value heads."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    left, dim = kv_heads - fewer, getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"num_attention_heads": heads // kv_heads * left, "num_key_value_heads": left, "head_dim": dim}


def _possible(config: Any, fewer: int) -> bool:
    """Whether a config takes so few heads: LLaMA wants the hidden size to be a multiple of their number."""
    try:
        type(config).from_dict(config.to_dict() | _head_keys(config, fewer))
    except Exception:  # whatever it checks, it fails in its own way
        return False
    return True


def _shrink_attentions(kept: _Kept, family: Family, values: list[_Dead], fewer: int) -> None:
    """Remove ``fewer`` key/value heads of every attention, with their queries."""
    for group, unit, gone in values:
        stay_K = _with_some(~gone.all(1), unit.num_kv_heads - fewer)
        stay_H = stay_K.repeat_interleave(unit.num_heads // unit.num_kv_heads)
        for end, stay in zip(family.attention[:3], (stay_H, stay_K, stay_K), strict=True):
            kept.put(kept.rows, group, f"{group.name}.{end}" if group.name else end, stay)
        kept.columns[unit.out] = stay_H.repeat_interleave(gone.shape[1])


def _check_shapes(source: Source, model: Any, edits: dict[str, Edit]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, stored in source.tensors.items():
        shape = edits.get(name, Edit()).shape(stored.shape)
        if expected.get(name, shape) != shape:
            raise UserError(
                f"--compact: `{name}` would be {list(shape)}, and the smaller model has {list(expected[name])} there: "
                "this model cannot be made smaller"
            )


def _cut(mask: Tensor, edit: Edit) -> Tensor:
    if edit.rows is not None:
        mask = mask[edit.rows]
    return mask if edit.columns is None else mask[:, edit.columns]
