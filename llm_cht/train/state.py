"""Everything that a run is, to and from tensors and plain values; ``checkpoint.py`` writes those.

Optimizer moments are stored by parameter name, so that a file can be read without the program that wrote it, and by
another number of ranks, under another engine. Each rank gives what only it has (its pieces of weights and moments under
ZeRO, history of the layers it owns, its random state); what all have alike, rank 0 gives. The weights are the fp32
masters, wherever they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.shards import Shards
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.train.checkpoint import Checkpoint
from llm_cht.train.pieces import Group, Piece
from llm_cht.train.random_state import random_state, restore_random_state


@dataclass
class Progress:
    """The counters of the loop."""

    step: int = 0
    """optimizer steps done"""
    tokens: int = 0
    """predicted tokens trained on"""
    density_sum: float = 0.0
    """density summed over the steps done; over ``step`` it is the average density"""
    flops: float = 0.0
    """of the steps and topology updates done (``train/flops.py``)"""
    dense_flops: float = 0.0
    """what the dense model would have needed for the same steps"""
    skipped: int = 0
    """steps skipped for a loss that was not finite"""
    best: float | None = None
    """of the figure by which the task chooses the best checkpoint"""
    last_validation: dict[str, float] = field(default_factory=dict)
    """step and figures of the latest validation"""


@dataclass(frozen=True)
class Parts:
    """The live objects of a run that have state."""

    model: nn.Module
    shards: Shards
    updater: TopologyUpdater | None
    """None for a dense run"""
    data: Any
    """the training batches: ``state_dict`` and ``load_state_dict`` of plain values"""
    progress: Progress


def collect(parts: Parts) -> tuple[dict[str, Group], dict[str, Any]]:
    """Tensors of this rank by group, and plain values: all that ``restore`` needs."""
    topology, topology_values = parts.updater.state_dict() if parts.updater else ({}, None)
    model, optimizer = _weights_and_moments(parts)
    tensors: dict[str, Group] = {
        "model": model,
        "optimizer": optimizer,
        "topology": topology,
        "random": random_state(),
    }
    values = {
        "progress": asdict(parts.progress),
        "data": parts.data.state_dict(),
        "topology": topology_values,
    }
    return tensors, values


def restore(parts: Parts, checkpoint: Checkpoint, seed: int) -> None:
    """Set every part to what it was when ``checkpoint`` was saved; ``seed`` serves ranks that were not there then.

    Raises:
        UserError: the checkpoint is of another model.
    """
    _check_shapes(parts.model, checkpoint)
    _load_weights(parts, checkpoint)
    _load_moments(parts, checkpoint)
    if parts.updater:
        parts.updater.load_state_dict(_Lazy(checkpoint, "topology"), checkpoint.state["topology"])
    parts.data.load_state_dict(checkpoint.state["data"])
    for key, value in checkpoint.state["progress"].items():
        setattr(parts.progress, key, value)
    restore_random_state(checkpoint, seed)


def _weights_and_moments(parts: Parts) -> tuple[Group, Group]:
    weights: dict[str, Tensor | Piece] = {}
    moments: dict[str, Tensor | Piece] = {}
    step = parts.shards.step()
    for name, tensor in parts.model.state_dict(keep_vars=True).items():
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            if dist.is_main():
                weights[name] = tensor.detach()
            continue
        part = parts.shards.fragment(tensor) if parts.shards.sharded or dist.is_main() else None
        if part is not None:
            weights[name] = _piece(part.master, part.start, _shape(tensor))
            for key, moment in part.moments.items():
                moments[f"{name}.{key}"] = _piece(moment, part.start, _shape(tensor))
        if dist.is_main() and step is not None:
            moments[f"{name}.step"] = torch.tensor(step)
    return weights, moments


def _piece(values: Tensor, start: int, shape: tuple[int, ...]) -> Tensor | Piece:
    return values.view(shape) if values.numel() == torch.Size(shape).numel() else Piece(values, start, shape)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO 3 a parameter's own shape is (0,)


def _check_shapes(model: nn.Module, checkpoint: Checkpoint) -> None:
    own = {name: _shape(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    saved = {name: checkpoint.shape("model", name) for name in checkpoint.names("model")}
    odd = sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name] != saved[name]]
    if odd:
        raise UserError(
            f"{checkpoint.path} is of another model: `{odd[0]}` differs; "
            "resume with the config that the run started with (RUN/config.yaml)"
        )


@torch.no_grad()
def _load_weights(parts: Parts, checkpoint: Checkpoint) -> None:
    for name, tensor in parts.model.state_dict(keep_vars=True).items():  # one at a time: no second model in memory
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            parts.shards.load(tensor, partial(checkpoint.read, "model", name))
        else:
            tensor.copy_(checkpoint.tensor("model", name))


def _load_moments(parts: Parts, checkpoint: Checkpoint) -> None:
    saved = checkpoint.names("optimizer")
    if not saved:  # saved before the first step
        return
    keys = {key.rpartition(".")[2] for key in saved}
    step = max(float(checkpoint.tensor("optimizer", key)) for key in saved if key.endswith(".step"))
    trained = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    parts.shards.make_moments(trained.values(), sorted(keys - {"step"}), step)
    for name, parameter in trained.items():
        part = parts.shards.fragment(parameter)
        if part is not None:
            for key, moment in part.moments.items():
                moment.copy_(checkpoint.read("optimizer", f"{name}.{key}", part.start, part.stop))


class _Lazy(Mapping[str, Tensor]):
    """A group of a checkpoint; a tensor is read when it is asked for, since a rank needs only those of its layers."""

    def __init__(self, checkpoint: Checkpoint, stem: str) -> None:
        self._checkpoint, self._stem = checkpoint, stem

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(self._stem, name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._checkpoint.names(self._stem)))

    def __len__(self) -> int:
        return len(self._checkpoint.names(self._stem))
