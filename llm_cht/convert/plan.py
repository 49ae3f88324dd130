"""Which tensors of a checkpoint are sparse layers, and how they belong together: asked of an empty model.

The model is built from the config on the meta device, so that names, shapes, biases, ties and groups are those that
training will find, at the cost of no memory. Rejected: guessing layers from the names in the files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm_cht.convert.source import FLOATS, Source
from llm_cht.errors import UserError
from llm_cht.models import auto_class, kind_of
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.percolate import Group


@dataclass(frozen=True)
class Layers:
    """The sparse layers of a model."""

    shapes: dict[str, tuple[int, int]]
    """(out, in) by layer name"""
    groups: tuple[Group, ...]
    biased: frozenset[str]
    """layers with a bias"""
    transposed: frozenset[str]
    """layers whose weight is stored as (in, out)"""


@contextmanager
def as_options() -> Iterator[None]:
    """Let messages about settings of a run speak of the options of the command, which have the same names."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"`(?:sparse|method)\.(\w+)", r"`--\1", str(error))) from error


def load_config(source: Source, code: bool) -> Any:
    """The config; ``code`` allows to run modelling code that came with the checkpoint.

    Raises:
        UserError: transformers does not know the model, or only by code that comes with it.
    """
    kind = source.config["model_type"]
    foreign = kind not in CONFIG_MAPPING
    if foreign and "auto_map" not in source.config:
        raise UserError(f"{source.folder}: transformers knows no model type `{kind}`; correct config.json")
    if foreign and not code:
        raise UserError(
            f"{source.folder}: `{kind}` is defined by Python code in that folder, which would be run; read it, then "
            "add --trust_remote_code"
        )
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=foreign)
    except Exception as error:  # code of strangers, or any check of a config
        raise UserError(f"{source.folder / 'config.json'} cannot be used: {_reason(error)}; correct it") from error


def empty_model(config: Any, code: bool) -> Any:
    """A model of the class that the config names (else that of its kind) without weights."""
    names = getattr(config, "architectures", None) or ["none"]
    stock = getattr(transformers, names[0], None) if type(config).__module__.startswith("transformers.") else None
    try:
        with torch.device("meta"):
            if stock is not None:
                return stock(copy.deepcopy(config))
            return auto_class(kind_of(config)).from_config(config, trust_remote_code=code)
    except Exception as error:  # sizes that do not fit fail anywhere, in any way
        raise UserError(f"the config makes no {names[0]}: {_reason(error)}; correct config.json") from error


def with_model_names(source: Source, model: Any) -> Source:
    """``source`` with the names of ``model``: some checkpoints lack the prefix of the base model, or have one more."""
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."

    def own(name: str) -> str:
        return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in known), name)

    return replace(source, tensors={own(name): stored for name, stored in source.tensors.items()})


def sparse_layers(source: Source, model: Any, settings: SparseSettings) -> Layers:
    """Choose layers as training does (``model`` is changed) and check the weights in the files.

    Raises:
        UserError: as ``sparsify``, and for weights that are not in the files, of another shape or no floats.
    """
    with as_options():
        sparse = sparsify(model, settings)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in sparse.layers.items()}
    for name, layer in sparse.layers.items():
        check_weight(source, name, tuple(layer.weight.shape))
    biased = frozenset(name for name, layer in sparse.layers.items() if layer.bias is not None)
    return Layers(shapes, sparse.groups, biased, sparse.transposed)


def check_weight(source: Source, name: str, shape: tuple[int, ...]) -> None:
    """Raise ``UserError`` unless the files hold the weight of layer ``name``, stored in that shape, as floats."""
    stored = source.tensors.get(f"{name}.weight")
    if stored is None:
        raise UserError(f"{source.folder}: the weight of `{name}` is in none of its files; give the whole model")
    if stored.shape != shape:
        raise UserError(
            f"{stored.path}: the weight of `{name}` is {list(stored.shape)}, config.json makes it {list(shape)}; "
            "the two are of different models, copy both again"
        )
    if stored.dtype not in FLOATS:
        raise UserError(
            f"{stored.path}: the weight of `{name}` is quantised ({stored.dtype}), which a mask cannot cut; give the "
            "unquantised model, or leave the layer out with `--exclude`"
        )


def check_target(source: Path, target: Path) -> None:
    """Raise ``UserError`` unless ``target`` can become a folder of its own."""
    here, there = source.resolve(), target.expanduser().resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(
            f"FOLDER = {target}: SOURCE lies in it, or it in SOURCE; nothing is converted in place, give another"
        )
    if there.exists() and not (there.is_dir() and not any(there.iterdir())):
        raise UserError(f"FOLDER = {target}: is there already, and not an empty folder; give another, or remove it")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(".")
