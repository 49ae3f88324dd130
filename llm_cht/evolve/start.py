"""The first topology of a live model: masks with exact counts, and first weights that are 0 off them.

Drawn on the CPU from counter-based keys, so that it is the same on every device and rank. Only CSTI looks at data: the
inputs of layers are caught on their way through the model as it was built, before a link is missing. Masks and weights
are drawn as (out, in), and turned where they are given to a layer that stores them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_cht.errors import UserError
from llm_cht.sparse.folder import read_topology
from llm_cht.sparse.surgery import SparseModel
from llm_cht.topology.correlated import Correlation
from llm_cht.topology.initial import STARTS, Given, InitialOptions, repair, unlinked
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import PATH_RULES, estimated_seconds
from llm_cht.topology.method import Method
from llm_cht.topology.weights import first_weight, own_std

PATIENCE_S = 120.0
"""estimated time of one layer's update above which a path rule must be forced"""
GPU_SPEEDUP = 100.0
"""of the estimate on CUDA, a guess by the peaks of fp32 products; not measured"""

Calibrate = Callable[[nn.Module], None]
"""runs the model forward on calibration samples"""


@dataclass(frozen=True)
class Start:
    """What the start of a run leaves behind besides masks and weights."""

    correlated: tuple[str, ...]
    """layers that CSTI has linked; the others started as er"""
    unlinked: dict[str, int]
    """neurons without a link: ``outputs`` and ``inputs``"""
    own_std: dict[str, float]
    """of each layer's weights as the model had them, for links that are drawn as at the start"""


def check_start(sparse: SparseModel, method: Method, on_gpu: bool = False) -> None:
    """Refuse what can be refused of a fresh run before data are read and anything is drawn.

    Raises:
        UserError: a density leaves a layer without a link; the file of the first links does not fit; a path rule would
            take minutes in a layer; heads are asked for and there are none.
    """
    settings, shapes = method.settings, _shapes(sparse)
    _check_time(shapes, method, on_gpu)
    if settings.per_head and not any(group.heads for group in sparse.groups):
        raise UserError("`method.per_head`: no sparse layer is a query, key or value of a known family; set false")
    if settings.csti_inner and settings.initial == "csti":
        for name, (num_outputs, num_inputs) in shapes.items():
            if num_outputs % num_inputs:
                raise UserError(
                    f"`method.csti_inner`: `{name}` has {num_outputs} outputs, no multiple of its {num_inputs} inputs; "
                    "leave the layer out with `sparse.exclude`, or set `method.csti_inner: false`"
                )
    masks = _masks_of_file(settings.initial_path, shapes) if settings.initial == "file" else None
    links = None if masks is None else {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    first = method.targets(shapes, 0, links)
    method.targets(shapes, method.updates.last_due, links)
    for name, count in (links or {}).items():
        if count != first[name].links:
            remedy = "set `method.budget: kept`, or `method.sparsity` and `method.budget` as there"
            if settings.density != "constant":
                remedy = f"its density begins at {method.density(0):.3g}; take another start by `method.initial`"
            raise UserError(
                f"`method.initial_path` = {settings.initial_path}: `{name}` has {count} links there and is to have "
                f"{first[name].links} under `method.preset: {settings.preset}`; {remedy}"
            )


@torch.no_grad()
def draw_start(sparse: SparseModel, method: Method, seed: int, calibrate: Calibrate | None = None) -> Start:
    """Draw the first topology and the first weights of a fresh model; weights of missing links become 0.

    The weights must be whole here: before ZeRO cuts them. Every rank draws the same.

    Raises:
        UserError: as ``check_start``, which comes first; CSTI without ``calibrate``, or with layers that it does not
            fit. Nothing is changed then.
    """
    settings = method.settings
    shapes = _shapes(sparse)
    given = _given(sparse, settings, calibrate)
    files = {name: int(one.mask_OI.count_nonzero()) for name, one in given.items() if one.mask_OI is not None}
    targets = method.targets(shapes, 0, files or None)
    level = _levelled(sparse, settings, calibrate)
    masks = {}
    for name in sparse.layers:
        rule, keys = settings.initial if name in given else "er", Keys(seed, 0, name)
        mask = STARTS[rule](
            shapes[name], targets[name].links, keys, _options(settings, name in level), given.get(name, Given())
        )
        masks[name] = repair(mask, keys) if settings.repair else mask
    deviations = {name: own_std(layer.as_OI(layer.weight)) for name, layer in sparse.layers.items()}
    lonely = {"outputs": 0, "inputs": 0}
    for name, layer in sparse.layers.items():
        mask = masks[name].to(layer.mask.device)
        density = targets[name].links / mask.numel()
        keys, own = Keys(seed, 0, name), layer.as_OI(layer.weight)
        weight = first_weight(settings.initial_weight, own, mask, density, settings.initial_gain, keys)
        layer.weight.copy_(layer.as_stored(weight))
        layer.set_mask(layer.as_stored(mask))
        outputs, inputs = unlinked(masks[name])
        lonely["outputs"] += outputs
        lonely["inputs"] += inputs
    return Start(tuple(name for name in given if settings.initial == "csti"), lonely, deviations)


def _check_time(shapes: Mapping[str, tuple[int, int]], method: Method, on_gpu: bool) -> None:
    """Refuse path rules where one layer would take longer than ``PATIENCE_S``; node rules stay quick at any density."""
    if method.settings.force or method.settings.budget == "kept":
        return
    interval, last = method.updates.interval, method.updates.end_step
    slow: dict[str, int] = {}  # first update of each path rule: density only decays
    for step in range(interval, last + 1, interval):
        if method.evolves(step) and method.regrowth(step) in PATH_RULES:
            slow.setdefault(method.regrowth(step), step)
    for rule, step in slow.items():
        for name, target in method.targets(shapes, step).items():
            density = target.links / math.prod(shapes[name])
            seconds = estimated_seconds(rule, shapes[name], density) / (GPU_SPEEDUP if on_gpu else 1.0)
            if seconds > PATIENCE_S:
                raise UserError(
                    f"`method.regrowth` = {rule}: an update of `{name}` {shapes[name]} at density {density:.3g} would "
                    f"take about {seconds / 60:.0f} minutes; take the node rule {rule[:-1]}n, raise `method.sparsity`, "
                    "or set `method.force: true`"
                )


def _shapes(sparse: SparseModel) -> dict[str, tuple[int, int]]:
    return {name: (layer.out_features, layer.in_features) for name, layer in sparse.layers.items()}


def _options(settings: Any, level: bool) -> InitialOptions:
    return InitialOptions(
        brf_r=settings.brf_r,
        brf_degree=settings.brf_degree,
        bsw_beta=settings.bsw_beta,
        bsf_equal_partition=level,
        bsf_resort=settings.bsf_resort,
        pruning=settings.pruning,
    )


def _levelled(sparse: SparseModel, settings: Any, calibrate: Calibrate | None) -> set[str]:
    """Layers whose input degrees are levelled under bsf: those that see the input of the model."""
    if settings.initial != "bsf" or not settings.bsf_equal_partition:
        return set()
    if calibrate is None:
        raise UserError("`method.bsf_equal_partition` needs a sample to find the first layers; pass `calibrate`")
    return {name for names in _readers(sparse, calibrate, lambda *_: None, inner=False).values() for name in names}


def _given(sparse: SparseModel, settings: Any, calibrate: Calibrate | None) -> dict[str, Given]:
    """What the start of each layer is made of; layers without an entry start as er."""
    if settings.initial == "csti":
        if calibrate is None:
            raise UserError("`method.initial: csti` needs calibration samples; pass `calibrate` or take another start")
        correlations = _correlations(sparse, calibrate, inner=settings.csti_inner)
        return {name: Given(correlation_II=correlation) for name, correlation in correlations.items()}
    if settings.initial == "file":
        masks = _masks_of_file(settings.initial_path, _shapes(sparse))
        return {name: Given(mask_OI=mask) for name, mask in masks.items()}
    if settings.initial == "checkpoint":
        return {
            name: Given(weight_OI=layer.as_OI(layer.weight.detach()).cpu()) for name, layer in sparse.layers.items()
        }
    return dict.fromkeys(sparse.layers, Given())


def _masks_of_file(path: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    masks = read_topology(Path(path)).masks_OI
    odd = sorted(shapes.keys() ^ masks.keys()) or [n for n, shape in shapes.items() if tuple(masks[n].shape) != shape]
    if odd:
        raise UserError(
            f"`method.initial_path` = {path}: its links are those of another model, `{odd[0]}` differs; give the model "
            "folder of a run with the same model and the same sparse layers"
        )
    return masks


def _correlations(sparse: SparseModel, calibrate: Calibrate, inner: bool) -> dict[str, Tensor]:
    """Correlations of the input features of every layer, or of those that see the input of the model."""
    sums: dict[str, Correlation] = {}

    def add(name: str, samples: Tensor) -> None:
        sums.setdefault(name, Correlation()).add(samples)

    readers = _readers(sparse, calibrate, add, inner)
    results = {first: total.result() for first, total in sums.items()}
    return {name: results[first] for first, names in readers.items() for name in names}


def _readers(
    sparse: SparseModel, calibrate: Calibrate, take: Callable[[str, Tensor], None], inner: bool
) -> dict[str, list[str]]:
    """Layers that read the same tensor, by the first of them, which ``take`` is called for.

    Without ``inner`` only those that read what the first layer of all reads: the input of the model, in some form.
    """
    readers: dict[str, list[str]] = {}
    read: dict[int, tuple[Tensor, str]] = {}  # of this pass; holds the tensors, so that an id stays theirs

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name == next(iter(readers), name):
                read.clear()
            key = id(inputs[0])
            if key not in read:
                if read and not inner:
                    return
                read[key] = (inputs[0], name)
                readers.setdefault(name, [])
                take(name, inputs[0])
            names = readers[read[key][1]]
            if name not in names:
                names.append(name)

        return hook

    hooks = [layer.register_forward_pre_hook(catch(name)) for name, layer in sparse.layers.items()]
    try:
        calibrate(sparse.model)
    finally:
        for hook in hooks:
            hook.remove()
    return readers
