"""``llm-cht convert``: a dense checkpoint into a sparse start, a sparse folder into a dense one, or into a smaller one.

All three are one thing: edits of tensors, written as a new folder, read again and compared. What can be refused is
refused before the first byte is written, and the folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_cht.convert.compact import compact
from llm_cht.convert.masks import ALL_BUDGETS, DRAWS, KEEP, draw_masks, percolated
from llm_cht.convert.plan import Layers, check_target, empty_model, load_config, sparse_layers, with_model_names
from llm_cht.convert.shards import DTYPES, Edit, planned, verify_shards, write_shards
from llm_cht.convert.source import FLOATS, Source, locate, open_source
from llm_cht.errors import UserError, nearest
from llm_cht.files import disk_errors, new_folder
from llm_cht.models import kind_of
from llm_cht.sparse.folder import read_packed, verify_folder, write_topology
from llm_cht.sparse.surgery import SparseSettings
from llm_cht.topology.bits import PackedMasks
from llm_cht.topology.initial import InitialOptions
from llm_cht.topology.presets import preset

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is converted, and how: the options of the command."""

    source: str
    """folder or hub name"""
    folder: Path
    """the new folder"""
    sparsity: float | None = None
    """share of missing links, in [0, 1)"""
    dense: bool = False
    """write a sparse folder without its topology"""
    compact: bool = False
    """write a sparse folder without its inactive neurons"""
    by: str = "magnitude"
    """which links: magnitude, ri (the strongest); er, brf, bsw, bsf (drawn)"""
    budget: str = "uniform"
    """links per layer: uniform, er, erk; global: the strongest of all layers together"""
    percolate: bool = False
    """remove links that pass no signal"""
    seed: int = 0
    """of what is drawn, and of ties"""
    dtype: str | None = None
    """of the floats; None: each tensor keeps its own"""
    include: list[str] | None = None
    """regular expressions of layer names; None: those of the family"""
    exclude: list[str] = field(default_factory=list)
    """regular expressions of layers that stay dense"""
    trust_remote_code: bool = False
    """run modelling code that comes with the checkpoint"""
    time: bool = False
    """after ``compact``: load both models whole and time them"""


@dataclass(frozen=True)
class _Work:
    """What a conversion writes."""

    source: Source
    edits: dict[str, Edit]
    config: dict[str, Any]
    topology: tuple[PackedMasks, str, int] | None
    """masks in the order of the stored weights, name and step"""
    report: str
    transposed: frozenset[str] = frozenset()
    """layers whose weight is stored as (in, out)"""


def convert(request: Request, say: Say) -> str:
    """Write ``request.folder``; returns what was done, for a person.

    Raises:
        UserError: options that do not fit together, a checkpoint or folder that cannot serve, no space.
    """
    _check(request)
    folder = locate(request.source, request.trust_remote_code)
    check_target(folder, request.folder)
    source = open_source(folder)
    if not source.has_tokenizer:
        say(f"note: {folder} has no tokenizer; name one to whoever uses {request.folder} (`data.tokenizer`)")
    floats = Counter(tensor.dtype for tensor in source.tensors.values() if tensor.dtype in FLOATS)
    if len(floats) > 1 and request.dtype is None:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in floats.most_common())
        say(f"note: the tensors have several types ({kinds}), which they keep; `--dtype` makes them one")
    if request.dense:
        work = _dense(source)
    elif request.compact:
        work = _compact(source)
    else:
        work = _sparse(source, request, say)
    counts = _write(work, request)
    lines = [work.report, f"{counts}; read again and found as written"]
    if request.time:
        (before, length), (after, _) = _seconds(folder), _seconds(request.folder)
        lines.append(f"forward pass of {length} tokens: {1e3 * before:.1f} ms before, {1e3 * after:.1f} ms after")
    return "\n".join(lines)


def _check(request: Request) -> None:
    modes = [request.sparsity is not None, request.dense, request.compact]
    if sum(modes) != 1:
        raise UserError("give one of --sparsity FRACTION, --dense and --compact")
    if request.sparsity is not None and not 0 <= request.sparsity < 1:
        raise UserError(f"--sparsity {request.sparsity:g}: must be a fraction in [0, 1), e.g. 0.9")
    for option, value, known in (
        ("by", request.by, (*KEEP, *DRAWS)),
        ("budget", request.budget, ALL_BUDGETS),
        ("dtype", request.dtype, (*DTYPES, None)),
    ):
        if value not in known:
            raise UserError(f"--{option} {value}: unknown; {nearest(str(value), [k for k in known if k])}")
    if request.budget == "global" and request.by in DRAWS:
        raise UserError(f"--budget global compares scores, and --by {request.by} has none; take magnitude, ri or er")
    default = Request(request.source, request.folder)
    given = [key for key in _OF_SPARSITY if getattr(request, key) != getattr(default, key)]
    if request.sparsity is None and given:
        raise UserError(f"--{given[0]} belongs to --sparsity: a sparse folder has its links already; leave it out")
    if request.time and not request.compact:
        raise UserError("--time compares a model with its compact form; add --compact, or leave it out")


_OF_SPARSITY = ("by", "budget", "percolate", "seed", "include", "exclude")


# ---- the three conversions ----


def _sparse(source: Source, request: Request, say: Say) -> _Work:
    assert request.sparsity is not None
    config = load_config(source, request.trust_remote_code)
    model = empty_model(config, request.trust_remote_code)
    source = with_model_names(source, model)
    layers = sparse_layers(source, model, SparseSettings(request.include, request.exclude))
    task = "translation" if kind_of(config) == "seq2seq" else "language_modelling"
    row = preset("chts", task)
    options = InitialOptions(brf_r=row["brf_r"], brf_degree=row["brf_degree"], bsw_beta=row["bsw_beta"])
    random = (request.seed, options)
    masks = draw_masks(source, layers, request.sparsity, request.by, request.budget, random)
    positions = sum(rows * columns for rows, columns in layers.shapes.values())
    told = f"{len(masks)} sparse layers with {positions:,} positions"
    if request.percolate:
        masks, told = _percolated(masks, layers, told, say)
    masks = masks.transposed(layers.transposed)
    edits = {f"{name}.weight": Edit(mask=_maker(masks, name)) for name in masks}
    return _Work(source, edits, source.config, (masks, request.by, 0), told, layers.transposed)


def _percolated(masks: PackedMasks, layers: Layers, told: str, say: Say) -> tuple[PackedMasks, str]:
    if not any(group.units for group in layers.groups):
        say("note: --percolate changes nothing: the family of this model, or the choice of layers, has no units")
        return masks, told
    passing, active, neurons = percolated(masks, layers)
    for name in passing:
        if not passing.packed[name].any():
            raise UserError(f"--percolate leaves no link in `{name}`; lower --sparsity, or leave it out")
    return passing, f"{told}, {active:,} of {neurons:,} neurons active"


def _dense(source: Source) -> _Work:
    verify_folder(source.folder)
    return _Work(source, {}, source.config, None, "the weights without their topology")


def _compact(source: Source) -> _Work:
    verify_folder(source.folder)
    masks, name, step = read_packed(source.folder)
    small = compact(source, load_config(source, code=False), masks)
    return _Work(source, small.edits, small.config, (small.masks, name, step), small.report, small.transposed)


def _maker(masks: PackedMasks, name: str) -> Callable[[], torch.Tensor]:
    return lambda: masks[name]


# ---- writing ----


def _write(work: _Work, request: Request) -> str:
    """Write the folder, read it again; returns its counts."""
    plan = planned(work.source.tensors, work.edits, request.dtype)
    target = request.folder.expanduser()
    others = work.source.others(request.trust_remote_code)
    needed = sum(one.nbytes for one in plan.values()) + sum(path.stat().st_size for path in others)
    if work.topology is not None:
        needed += sum(packed.numel() for packed in work.topology[0].packed.values())
    _check_space(target, needed)
    with disk_errors(target, needed, "Nothing of it was kept."), new_folder(target) as fresh:
        digests = write_shards(fresh, plan)
        for path in others:
            shutil.copyfile(path, fresh / path.name)
        config = work.config | ({} if request.dtype is None else _dtype_keys(work.config, request.dtype))
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if work.topology is not None:
            write_topology(fresh, *work.topology, transposed=work.transposed)
        verify_shards(fresh, digests)
        counts = verify_folder(fresh) if work.topology is not None else {}
    links, nonzero = sum(c.links for c in counts.values()), sum(c.nonzero for c in counts.values())
    size = sum(one.nbytes for one in plan.values())
    before = sum(one.stored.nbytes for one in plan.values())
    told = f"{links:,} links, {nonzero:,} of them not 0; " if counts else ""
    return f"{told}{size / 1e6:,.1f} MB of weights, from {before / 1e6:,.1f} MB"


def _check_space(target: Path, needed: int) -> None:
    place = next(path for path in target.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"FOLDER = {target}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free there; free space, "
            "or give another place"
        )


def _dtype_keys(config: dict[str, Any], dtype: str) -> dict[str, str]:
    """The keys that say how the weights are stored: transformers has renamed it."""
    return {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}


# ---- time ----

_TOKENS, _REPEATS = 128, 5


def _seconds(folder: Path) -> tuple[float, int]:
    """Median time of a forward pass on this machine's processor, and the tokens in it; loads the model."""
    source = open_source(folder)
    config = load_config(source, code=False)
    model = type(empty_model(config, code=False)).from_pretrained(folder, dtype="auto").eval()
    length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    ids = torch.arange(_TOKENS).remainder(config.vocab_size)[None, :length]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    took = []
    with torch.inference_mode():
        for _ in range(1 + _REPEATS):
            begin = time.perf_counter()
            model(**inputs)
            took.append(time.perf_counter() - begin)
    return statistics.median(took[1:]), length
