"""Swap the linear layers of a model for sparse ones: all checks first, then the swap, then a report.

A walk over the named modules with one predicate. The swapped layers share the model's Parameters, so references held
elsewhere (an optimizer, a checkpoint loader) stay valid. Every link exists after the swap; the updater of
``llm_cht.evolve`` draws the first topology.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_cht.errors import UserError
from llm_cht.sparse.families import FAMILIES, Family, block_linears, groups_of, is_linear
from llm_cht.sparse.linear import SparseLayer, sparse_layer
from llm_cht.topology.percolate import Group


@dataclass
class SparseSettings:
    """Which layers become sparse."""

    include: list[str] | None = None
    """Regular expressions searched in full layer names; null: the projections of the model's family, or, where it
    has no row, all linear layers of the model's blocks."""
    exclude: list[str] = field(default_factory=list)
    """Regular expressions of layers that stay dense."""


@dataclass(frozen=True)
class SparseModel:
    """A model after surgery."""

    model: nn.Module
    layers: dict[str, SparseLayer]
    """by full name, in the order of the model"""
    groups: tuple[Group, ...]
    """layers that are evolved together"""
    dense: tuple[str, ...]
    """names of the linear layers that were left as they are"""

    @property
    def masks(self) -> dict[str, Tensor]:
        """Of every layer, as it is stored."""
        return {name: layer.mask for name, layer in self.layers.items()}

    @property
    def density(self) -> float:
        """Existing links over all positions, now."""
        masks = self.masks.values()
        return sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)

    @property
    def transposed(self) -> frozenset[str]:
        """Layers whose weight and mask are stored as (in, out)."""
        return frozenset(name for name, layer in self.layers.items() if layer.transposed)

    def report(self) -> str:
        """What was swapped, for a person."""
        kinds = Counter(
            f"{name.rpartition('.')[2]} {(layer.out_features, layer.in_features)}"
            for name, layer in self.layers.items()
        )
        swapped = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        positions = sum(layer.weight.numel() for layer in self.layers.values())
        units = sum(len(group.units) for group in self.groups)
        return (
            f"sparse layers: {len(self.layers)} with {positions:,} positions in {len(self.groups)} groups, "
            f"{units} percolation units ({swapped}); dense linear layers: {', '.join(self.dense) or 'none'}"
        )


def sparsify(model: nn.Module, settings: SparseSettings) -> SparseModel:
    """Swap the chosen linear layers of ``model`` in place for ``SparseLinear`` or, GPT-2's, ``SparseConv1D``.

    A model whose family has no row is swapped by a plain rule, with a warning that nothing percolates.

    Raises:
        UserError: nothing matches, an exclusion matches nothing, a chosen layer is no plain ``nn.Linear`` or
            ``Conv1D``, is already sparse, or its weight is shared with another module. The model is then untouched.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    _check_expressions("include", settings.include or [])
    _check_expressions("exclude", settings.exclude)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    chosen = _chosen(model, linears, settings, family)
    excluded = {name for name in chosen for pattern in settings.exclude if re.search(pattern, name)}
    _check_patterns(settings, linears, chosen, excluded)
    names = [name for name in chosen if name not in excluded]
    _check_layers(model, {name: linears[name] for name in names})
    if family is None and settings.include is None:
        warnings.warn(
            f"model type `{model_type}` has no row in llm_cht/sparse/families.py (known: {', '.join(FAMILIES)}): all "
            f"{len(names)} linear layers of its blocks become sparse, each evolves alone, and nothing percolates; "
            "choose layers with `sparse.include` and `sparse.exclude`, or add a row",
            stacklevel=2,
        )
    groups = groups_of(model, family, names)
    layers = {name: sparse_layer(linears[name]) for name in names}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return SparseModel(model, layers, groups, tuple(name for name in linears if name not in layers))


def _chosen(
    model: nn.Module, linears: dict[str, nn.Module], settings: SparseSettings, family: Family | None
) -> list[str]:
    """Layers to swap, before exclusions."""
    if settings.include is not None:
        return [name for name in linears if any(re.search(pattern, name) for pattern in settings.include)]
    if family is not None:
        return [name for name in linears if family.base(name) is not None]
    inner = block_linears(model)
    return [name for name in linears if name in inner]


def _check_expressions(key: str, patterns: list[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"`sparse.{key}`: {pattern!r} is no regular expression: {error}; correct it") from error


def _check_patterns(
    settings: SparseSettings, linears: dict[str, nn.Module], chosen: list[str], excluded: set[str]
) -> None:
    examples = ", ".join(list(linears)[:3]) or "none"
    if settings.include == []:
        raise UserError("`sparse.include` = []: no layer would be sparse; null takes the projections of the family")
    for key, patterns, names in (("include", settings.include or [], linears), ("exclude", settings.exclude, chosen)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise UserError(f"`sparse.{key}`: {pattern!r} matches no linear layer (the model has e.g. {examples})")
    if not chosen:
        raise UserError(
            "no linear layer of the model is a projection of its family, or, for a model without one, inside a block "
            f"(it has e.g. {examples}); name the layers to swap in `sparse.include`"
        )
    if not set(chosen) - excluded:
        raise UserError(f"`sparse.exclude` {settings.exclude} leaves none of the {len(chosen)} chosen layers")


def _check_layers(model: nn.Module, layers: dict[str, Any]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        if isinstance(layer, SparseLayer):
            raise UserError(f"layer `{name}` is sparse already; sparsify a model once")
        if type(layer) not in (nn.Linear, Conv1D) or not layer.weight.is_floating_point():
            raise UserError(
                f"layer `{name}` is {type(layer).__name__} with {layer.weight.dtype} weights, not a plain nn.Linear; "
                "load the model unquantised, or leave the layer out with `sparse.exclude`"
            )
        shared = owners[id(layer.weight)]
        if len(shared) > 1:
            raise UserError(
                f"the weight of `{name}` is shared ({' = '.join(shared)}); a mask would hit both: "
                "untie it, or leave the layer out with `sparse.exclude`"
            )
