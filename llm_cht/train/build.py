"""Builds the parts of a run from its settings: data, model, surgery, first topology, optimizer, engine. No loop.

What can fail on one rank alone comes first, together: all ranks go on, or all stop with the same message. Only then
the engine is asked to cut weights between the ranks, which is a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from llm_cht import dist
from llm_cht.data.text import TextData, check_vocabulary, load_text
from llm_cht.errors import UserError
from llm_cht.evolve.start import check_start, draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.models import build_model
from llm_cht.sparse.surgery import SparseModel, sparsify
from llm_cht.topology.checks import without_effect
from llm_cht.topology.method import resolve
from llm_cht.train.config import RunSettings
from llm_cht.train.engine import Engine
from llm_cht.train.environment import versions
from llm_cht.train.flops import Flops, training_flops_per_token
from llm_cht.train.optim import build_optimizer
from llm_cht.train.state import Parts, Progress


@dataclass(frozen=True)
class Built:
    """The live run."""

    settings: RunSettings
    engine: Engine
    data: TextData
    model: Any
    """the transformers model with its sparse layers; under ZeRO 3 its weights are elsewhere"""
    forward: Any
    """the same as the loop calls it: compiled, or wrapped by accelerate or DeepSpeed"""
    optimizer: Optimizer
    """torch's, whose param_groups hold the learning rate"""
    updater: TopologyUpdater | None
    """None for the preset `dense`, which trains the unmodified model"""
    parts: Parts
    flops: Flops
    start_record: dict[str, Any]
    """what stands in the metrics before the first step"""


def build(settings: RunSettings, engine: Engine, fresh: bool, say: Callable[[str], None]) -> Built:
    """Build every part; a ``fresh`` run's first topology is drawn. A collective.

    Raises:
        UserError: from any part, before anything is written to the run folder.
    """
    train = settings.train
    method = resolve(settings.method, train.steps)
    start = None
    with dist.together(patient=True):
        model, sparse = _build_model(settings, engine, say)
        if sparse is not None and fresh:
            check_start(sparse, method, on_gpu=engine.device.type == "cuda")
        for sentence in without_effect(method.settings):
            say(f"note: {sentence}")
        data = load_text(settings.data, settings.seed)  # late: it can take hours, the mistakes above show at once
        check_vocabulary(data.tokenizer, model.config.vocab_size)
        if sparse is not None and fresh:
            start = draw_start(sparse, method, settings.seed, partial(_calibrate, settings, engine, data))
    if start is not None and start.correlated:
        say(f"csti: {len(start.correlated)} layers ({', '.join(start.correlated)}); the others start as er")
    optimizer = build_optimizer(model, settings.optimizer)
    positions = sum(layer.mask.numel() for layer in sparse.layers.values()) if sparse else 0
    flops = Flops(training_flops_per_token(model, settings.data.sequence_length), positions)
    record = _start_record(model, sparse, start.unlinked if start else {"outputs": 0, "inputs": 0}, engine)
    forward, shards = engine.prepare(torch.compile(model) if train.compile else model, model, optimizer)
    updater = None
    if sparse is not None:
        updater = TopologyUpdater(sparse, method, shards, settings.seed)
        if start is not None:
            updater.own_std = start.own_std
            updater.agree("the start")
    parts = Parts(model, shards, updater, data.train, Progress())
    return Built(settings, engine, data, model, forward, optimizer, updater, parts, flops, record)


def _build_model(settings: RunSettings, engine: Engine, say: Callable[[str], None]) -> tuple[Any, SparseModel | None]:
    model: Any = build_model(settings.model, settings.seed)
    _check_length(settings.data.sequence_length, model.config)
    model.to(dtype=engine.model_dtype)
    if not engine.zero_stage:  # DeepSpeed moves it, in its working precision
        model.to(device=engine.device)
    if settings.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if settings.method.preset == "dense":
        return model, None
    sparse = sparsify(model, settings.sparse)
    say(sparse.report())
    return model, sparse


def _calibrate(settings: RunSettings, engine: Engine, data: TextData, model: Any) -> None:
    """Run the first training sequences through the model; the training itself begins with them all the same."""
    position = data.train.state_dict()
    count = settings.method.calibration_sequences
    samples = data.train.batch(0, count)["input_ids"]
    data.train.load_state_dict(position)
    device = next(model.parameters()).device
    model.eval()
    for rows in samples.split(engine.micro_batch_size):
        model(rows.to(device), use_cache=False)
    model.train()


def _start_record(model: Any, sparse: SparseModel | None, lonely: dict[str, int], engine: Engine) -> dict[str, Any]:
    """``lonely`` counts neurons that start without a link."""
    layers = sparse.layers if sparse else {}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sparse_parameters": sum(layer.mask.numel() for layer in layers.values()),
        "layers": {
            name: {"shape": list(layer.mask.shape), "sparsity": 1 - layer.mask.float().mean().item()}
            for name, layer in layers.items()
        },
        "unlinked": lonely,
        "device": str(engine.device),
        "dtype": engine.settings.precision,
        "engine": engine.name,
        "world_size": dist.world_size(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _check_length(sequence_length: int, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", None)  # some families have no bound
    if longest is not None and sequence_length > longest:
        raise UserError(
            f"`data.sequence_length` = {sequence_length} is above the model's `max_position_embeddings` = {longest}; "
            "lower it, or set `model.overrides.max_position_embeddings`"
        )
