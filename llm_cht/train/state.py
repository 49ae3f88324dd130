"""Everything that a run is, to and from tensors and plain values; ``checkpoint.py`` writes those.

Optimizer moments are stored by parameter name, so that a file can be read without the program that wrote it, and by
another number of ranks. Each rank gives what only it has (its random state); what all have alike, rank 0 gives.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.train.checkpoint import Checkpoint
from llm_cht.train.pieces import Group
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
    skipped: int = 0
    """steps skipped for a loss that was not finite"""
    best_loss: float | None = None
    """lowest validation loss"""
    last_validation: dict[str, float] = field(default_factory=dict)
    """loss and step of the latest validation"""


@dataclass(frozen=True)
class Parts:
    """The live objects of a run that have state."""

    model: nn.Module
    optimizer: Optimizer
    updater: TopologyUpdater | None
    """None for a dense run"""
    data: Any
    """the training batches: ``state_dict`` and ``load_state_dict`` of plain values"""
    progress: Progress


def collect(parts: Parts) -> tuple[dict[str, Group], dict[str, Any]]:
    """Tensors of this rank by group, and plain values: all that ``restore`` needs."""
    topology, topology_values = parts.updater.state_dict() if parts.updater else ({}, None)
    main = dist.is_main()
    tensors: dict[str, Group] = {
        "model": dict(parts.model.state_dict()) if main else {},
        "optimizer": _moments(parts.model, parts.optimizer) if main else {},
        "topology": topology if main else {},
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
    _load_weights(parts.model, checkpoint)
    _load_moments(parts.model, parts.optimizer, checkpoint)
    if parts.updater:
        parts.updater.load_state_dict(checkpoint.tensors("topology"), checkpoint.state["topology"])
    parts.data.load_state_dict(checkpoint.state["data"])
    for key, value in checkpoint.state["progress"].items():
        setattr(parts.progress, key, value)
    restore_random_state(checkpoint, seed)


@torch.no_grad()
def _load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    own, saved = model.state_dict(), {name: checkpoint.shape("model", name) for name in checkpoint.names("model")}
    odd = sorted(own.keys() ^ saved.keys()) or [name for name in own if tuple(own[name].shape) != saved[name]]
    if odd:
        raise UserError(
            f"{checkpoint.path} is of another model: `{odd[0]}` differs; "
            "resume with the config that the run started with (RUN/config.yaml)"
        )
    for name, tensor in own.items():
        tensor.copy_(checkpoint.tensor("model", name))  # one at a time: no second model in memory


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _load_moments(model: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Through the optimizer's own ``load_state_dict``, which puts every tensor on its device."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key in checkpoint.names("optimizer"):
        name, _, moment = key.rpartition(".")
        by_parameter.setdefault(name, {})[moment] = checkpoint.tensor("optimizer", key)
    packed = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {i: by_parameter[names[p]] for i, p in enumerate(ordered) if names[p] in by_parameter}
    optimizer.load_state_dict(packed)


def as_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name like ``float32``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype
