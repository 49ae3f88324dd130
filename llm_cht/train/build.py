"""Builds the parts of a run from its settings: data, model, surgery, first topology, optimizer, engine. No loop.

What can fail on one rank alone comes first, together: all ranks go on, or all stop with the same message. Only then
the engine is asked to cut weights between the ranks, which is a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llm_cht import dist
from llm_cht.data.pair_vocabulary import TRAINED
from llm_cht.data.pairs import PairData, load_pairs, untrained
from llm_cht.data.text import check_vocabulary, load_text
from llm_cht.evolve.start import check_start, draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.models import build_model, check_kind
from llm_cht.sparse.surgery import SparseModel, sparsify
from llm_cht.topology.checks import without_effect
from llm_cht.topology.method import resolve
from llm_cht.train.config import RunSettings, told_on_checkpoint
from llm_cht.train.engine import Engine
from llm_cht.train.environment import versions
from llm_cht.train.flops import Flops, pair_flops, training_flops_per_token
from llm_cht.train.language_modelling import LanguageModelling, check_length
from llm_cht.train.optim import build_optimizer
from llm_cht.train.state import Parts, Progress
from llm_cht.train.task import Task
from llm_cht.train.translation import Translation, check_positions, checkpoint_tokenizer, vocabulary_of


@dataclass(frozen=True)
class Built:
    """The live run."""

    settings: RunSettings
    engine: Engine
    task: Task
    model: Any
    """the transformers model with its sparse layers; under ZeRO 3 its weights are elsewhere"""
    forward: Any
    """the same as the loop calls it: compiled, or wrapped by accelerate or DeepSpeed"""
    optimizer: Optimizer
    """torch's, whose param_groups hold the learning rate"""
    updater: TopologyUpdater | None
    """None for the preset `dense`, which trains the unmodified model"""
    parts: Parts
    width: int
    """of the residual stream"""
    start_record: dict[str, Any]
    """what stands in the metrics before the first step"""


def build(settings: RunSettings, engine: Engine, fresh: bool, say: Callable[[str], None]) -> Built:
    """Build every part; a ``fresh`` run's first topology is drawn. A collective.

    Raises:
        UserError: from any part, before anything is written to the run folder.
    """
    train = settings.train
    method = resolve(settings.method, train.steps, settings.task)
    start = None
    with dist.together(patient=True):
        pairs = prepare_pairs(settings) if settings.task == "translation" else None
        for name in untrained(settings.pairs, settings.model.path is not None) if pairs is not None else ():
            say(f"note: `pairs.{name}` has no effect, because no vocabulary is trained here")
        model, sparse = _build_model(settings, engine, pairs, say)
        if sparse is not None and fresh:
            check_start(sparse, method, on_gpu=engine.device.type == "cuda")
        told = [told_on_checkpoint(settings)] if fresh else []
        for sentence in [*filter(None, told), *without_effect(method.settings)]:
            say(f"note: {sentence}")
        task = _task(settings, engine, pairs, model, sparse)
        if sparse is not None and fresh:
            start = draw_start(sparse, method, settings.seed, task.calibrate)
    if start is not None and start.correlated:
        say(f"csti: {len(start.correlated)} layers ({', '.join(start.correlated)}); the others start as er")
    optimizer = build_optimizer(model, settings.optimizer)
    width = model.get_input_embeddings().embedding_dim
    record = _start_record(model, sparse, start.unlinked if start else {"outputs": 0, "inputs": 0}, engine)
    forward, shards = engine.prepare(torch.compile(model) if train.compile else model, model, optimizer)
    updater = None
    if sparse is not None:
        updater = TopologyUpdater(sparse, method, shards, settings.seed)
        if start is not None:
            updater.own_std = start.own_std
            updater.agree("after the start")
    parts = Parts(model, shards, updater, task.stream, Progress())
    return Built(settings, engine, task, model, forward, optimizer, updater, parts, width, record)


def prepare_pairs(settings: RunSettings) -> PairData:
    """The sentence pairs of a run: first of all, because their vocabularies decide the size of the model."""
    assert settings.train.batch_tokens is not None
    check_kind(settings.model, "seq2seq")
    trained = settings.pairs.vocabulary in TRAINED
    tokenizer = checkpoint_tokenizer(settings.model.path) if settings.model.path and trained else None
    return load_pairs(settings.pairs, settings.train.batch_tokens, settings.seed, tokenizer)


def _build_model(
    settings: RunSettings, engine: Engine, pairs: PairData | None, say: Callable[[str], None]
) -> tuple[Any, SparseModel | None]:
    if pairs is None:
        model: Any = build_model(settings.model, settings.seed)
        check_length(settings.data.sequence_length, model.config)
    else:
        model = build_model(settings.model, settings.seed, "seq2seq", vocabulary_of(pairs))
        check_positions(pairs, model.config)
    _hold_frozen(model)
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


def _hold_frozen(model: nn.Module) -> None:
    """Make buffers of parameters that are not trained (Marian's positions): ZeRO 3 would cut them up like weights.

    Names and values in the state dict stay the same.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _task(
    settings: RunSettings, engine: Engine, pairs: PairData | None, model: Any, sparse: SparseModel | None
) -> Task:
    sizes = {name: layer.mask.numel() for name, layer in sparse.layers.items()} if sparse else {}
    if pairs is not None:
        return Translation(settings, pairs, engine, model.config, pair_flops(model, sizes))
    data = load_text(settings.data, settings.seed)  # late: it can take hours, the mistakes above show at once
    check_vocabulary(data.tokenizer, model.config.vocab_size)
    flops = Flops(training_flops_per_token(model, settings.data.sequence_length), sum(sizes.values()))
    return LanguageModelling(settings, data, engine, flops)


def _start_record(model: Any, sparse: SparseModel | None, lonely: dict[str, int], engine: Engine) -> dict[str, Any]:
    """``lonely`` counts neurons that start without a link."""
    layers = sparse.layers if sparse else {}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sparse_parameters": sum(layer.mask.numel() for layer in layers.values()),
        "layers": {
            name: {"shape": [layer.out_features, layer.in_features], "sparsity": 1 - layer.mask.float().mean().item()}
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
