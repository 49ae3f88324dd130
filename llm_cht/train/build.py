"""Builds the parts of a run from its settings: data, model, surgery, optimizer, topology. No loop, no files written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llm_cht.data.text import TextData, check_vocabulary, load_text
from llm_cht.errors import UserError
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.models import build_model
from llm_cht.sparse.surgery import sparsify
from llm_cht.topology.method import resolve
from llm_cht.train.config import RunSettings
from llm_cht.train.engine import Engine, start_engine
from llm_cht.train.optim import build_optimizer
from llm_cht.train.state import Parts, Progress


@dataclass(frozen=True)
class Built:
    """The live run."""

    settings: RunSettings
    engine: Engine
    data: TextData
    model: Any
    """the transformers model with its sparse layers; what is saved and exported"""
    forward: nn.Module
    """the same as the loop calls it: compiled, or wrapped by accelerate"""
    optimizer: Optimizer
    updater: TopologyUpdater | None
    """None for the preset `dense`, which trains the unmodified model"""
    parts: Parts

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step."""
        train = self.settings.train
        return train.batch_size // (train.micro_batch_size or train.batch_size)

    def start_record(self, lonely: dict[str, int]) -> dict[str, Any]:
        """What stands in the metrics before the first step; ``lonely`` counts neurons that start without a link."""
        layers = self.updater.sparse.layers if self.updater else {}
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "sparse_parameters": sum(layer.weight.numel() for layer in layers.values()),
            "layers": {
                name: {"shape": list(layer.mask.shape), "sparsity": 1 - layer.mask.float().mean().item()}
                for name, layer in layers.items()
            },
            "unlinked": lonely,
            "device": str(self.engine.device),
            "dtype": self.engine.precision,
            "world_size": self.engine.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    import platform

    import accelerate
    import transformers

    from llm_cht import __version__

    return {
        "llm_cht": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def build(settings: RunSettings, say: Callable[[str], None]) -> Built:
    """Build every part; the topology is still full, the weights fresh.

    Raises:
        UserError: from any part, before anything is written to the run folder.
    """
    train = settings.train
    engine = start_engine(
        train.device, train.precision, train.batch_size // (train.micro_batch_size or train.batch_size)
    )
    model: Any = build_model(settings.model, settings.seed)
    _check_length(settings.data.sequence_length, model.config)
    model.to(device=engine.device, dtype=engine.model_dtype)
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    sparse = None
    if settings.method.preset != "dense":
        sparse = sparsify(model, settings.sparse)
        say(sparse.report())
    optimizer = build_optimizer(model, settings.optimizer)
    updater = None
    if sparse is not None:
        updater = TopologyUpdater(sparse, resolve(settings.method, train.steps), optimizer, settings.seed)
    data = load_text(settings.data, settings.seed)  # last: it can take hours, the mistakes above show at once
    check_vocabulary(data.tokenizer, model.config.vocab_size)
    forward = engine.accelerator.prepare_model(torch.compile(model) if train.compile else model)
    parts = Parts(model, optimizer, updater, data.train, Progress())
    return Built(settings, engine, data, model, forward, optimizer, updater, parts)


def _check_length(sequence_length: int, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", None)  # some families have no bound
    if longest is not None and sequence_length > longest:
        raise UserError(
            f"`data.sequence_length` = {sequence_length} is above the model's `max_position_embeddings` = {longest}; "
            "lower it, or set `model.overrides.max_position_embeddings`"
        )
