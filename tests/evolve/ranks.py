"""What every rank of ``test_ranks.py`` runs: ``ranks.py OUT TASK ...``, under accelerate launch or alone.

A tiny LLaMA under whatever engine the launcher asks for; weights and gradients are set to numbers that are functions
of (layer, update, index), so that they are equal under every engine.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.start import draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.keys import Keys
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings
from llm_cht.train.engine import Engine, EngineSettings, start_engine
from llm_cht.train.optim import OptimizerSettings, build_optimizer

PRESETS = ("chts", "chtss", "set", "rigl")
CASES = {name: {"preset": name} for name in (*PRESETS, "snfs", "mest", "gmp", "granet", "cht")}
CASES |= {
    "across layers": {"preset": "granet", "pruning_scope": "global"},
    "new weights": {"preset": "chtss", "new_weight": "init"},
    "per head": {"preset": "chts", "per_head": True},
}
UPDATES = 10
BATCH, MICRO = 8, 2


def start(precision: str) -> Engine:
    return start_engine(EngineSettings("cpu", precision, BATCH, MICRO, 1.0, 120.0, False))


def make(engine: Engine, case: str, weight_decay: float = 0.1):
    """The model as built, as called, its updater and optimizer."""
    torch.manual_seed(0)
    # sizes that no number of ranks divides evenly
    sizes = dict(vocab_size=67, hidden_size=24, intermediate_size=37, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sparse = sparsify(model, SparseSettings())
    method = resolve(MethodSettings(**CASES[case], sparsity=0.9, update_interval=2), 40)
    begun = draw_start(sparse, method, 5)
    optimizer = build_optimizer(model, OptimizerSettings(name="adamw", lr=0.01, weight_decay=weight_decay))
    forward, shards = engine.prepare(model, model, optimizer)
    updater = TopologyUpdater(sparse, method, shards, 5)
    updater.own_std = begun.own_std
    return model, forward, updater, optimizer


def set_moments(model, updater: TopologyUpdater) -> None:
    """1 on every existing link."""
    updater.shards.make_moments([p for p in model.parameters() if p.requires_grad], ("exp_avg", "exp_avg_sq"), 3.0)
    for layer in updater.sparse.layers.values():
        part = updater.shards.fragment(layer.weight)
        if part is not None:
            for moment in part.moments.values():
                moment.copy_(layer.mask.view(-1)[part.start : part.stop])


def set_weights(updater: TopologyUpdater, update: int) -> None:
    """Weights of existing links: whole multiples of 1/256 in [-1/2, 1/2], none of them 0."""
    for name, layer in updater.sparse.layers.items():
        index = torch.arange(layer.mask.numel())
        drawn = Keys(1, update, name).bits("weight", index) % 256 - 128
        weight = torch.where(layer.mask.view(-1), (drawn + (drawn >= 0)) / 256, 0.0)
        updater.shards.load(layer.weight, lambda start, stop, weight=weight: weight[start:stop])


def set_gradients(updater: TopologyUpdater, update: int) -> None:
    """Each rank's part of a gradient whose sum over the ranks is exact, and the same for any number of them."""
    for name, layer in updater.sparse.layers.items():
        whole = (Keys(2, update, name).bits("gradient", torch.arange(layer.mask.numel())) % 4096 - 2048).float()
        own = torch.full_like(whole, 1024.0 * (dist.rank() + 1))
        extra = sum(1024.0 * (rank + 1) for rank in range(dist.world_size()))
        if dist.rank() == 0:
            own += whole * dist.world_size() - extra
        layer.captured = own.view_as(layer.mask).contiguous()


def updates_alone(engine: Engine) -> dict:
    """Digests of all masks after each of ten updates of every case."""
    told = {}
    for case in CASES:
        model, _, updater, _ = make(engine, case)
        digests = []
        for number in range(1, UPDATES + 1):
            set_weights(updater, number)
            set_moments(model, updater)
            if updater.method.needs_gradient(2 * number) or updater.method.needs_momentum(2 * number):
                set_gradients(updater, number)
            updater.learned(2 * number)
            before = {name: mask.clone() for name, mask in updater.masks.items()}
            figures = updater.update(2 * number)
            check_update(updater, before)
            digests.append(updater.digest())
        told[case] = {"digests": digests, "figures": {k: v for k, v in figures.items() if isinstance(v, int | float)}}
    return told


def check_update(updater: TopologyUpdater, before: dict[str, torch.Tensor]) -> None:
    """Right after an update: zero off the mask everywhere, moments of links that changed 0, those of others kept."""
    check_zeros(updater)
    for name, layer in updater.sparse.layers.items():
        part = updater.shards.fragment(layer.weight)
        if part is not None:
            assert part.moments
            here = slice(part.start, part.stop)
            stayed = (before[name] & layer.mask).view(-1)[here]
            for moment in part.moments.values():
                assert torch.equal(moment, stayed.to(moment.dtype)), name


def check_zeros(updater: TopologyUpdater) -> None:
    """Working copy, master and moments are exactly 0 off the mask, on this rank."""
    for name, layer in updater.sparse.layers.items():
        off = ~layer.mask.view(-1)
        part = updater.shards.fragment(layer.weight)
        if part is not None:
            here = off[part.start : part.stop]
            assert (part.master[here] == 0).all(), f"master of {name}"
            for key, moment in part.moments.items():
                assert (moment[here] == 0).all(), f"{key} of {name}"
        working = layer.weight.detach().view(-1)
        if working.numel() == off.numel():
            assert (working[off] == 0).all(), f"working copy of {name}"
            assert part is None or torch.equal(working[part.start : part.stop], part.master.to(working.dtype)), name
        else:
            cut = layer.weight.ds_tensor.data.view(-1)
            assert part is None or torch.equal(cut[: part.master.numel()], part.master.to(cut.dtype)), name


def train(engine: Engine) -> dict:
    """Some steps of every preset with accumulation, clipping and weight decay; zeros checked after every step."""
    told = {}
    for preset in PRESETS:
        _, forward, updater, optimizer = make(engine, preset)
        losses, digests = [], []
        for step in range(1, 13):
            tokens = torch.randint(0, 67, (BATCH, 16), generator=torch.Generator().manual_seed(step))[engine.share]
            updater.watch(step)
            loss = 0.0
            passes = engine.accumulation_steps
            for number in range(passes):
                rows = tokens[number * MICRO : (number + 1) * MICRO]
                with engine.accumulate(forward, last=number == passes - 1):
                    share = BATCH * 15 / passes / dist.world_size()
                    with engine.autocast():
                        part = forward(rows, labels=rows, num_items_in_batch=share).loss
                    engine.backward(forward, part)
                loss += part.item() / passes
            engine.step(forward, optimizer)
            losses.append(dist.total([loss])[0] / dist.world_size())
            check_zeros(updater)
            updater.learned(step)
            if updater.due(step):
                updater.update(step)
                check_zeros(updater)
                digests.append(updater.digest())
        told[preset] = {"losses": losses, "digests": digests}
    return told


def broken(engine: Engine) -> list[str]:
    """What the checks above say when an update forgets the moments, or the masters, of what is on this rank."""
    told = []
    for forgotten in ("moments", "master"):
        model, _, updater, _ = make(engine, "set")
        set_weights(updater, 1)
        set_moments(model, updater)
        before = {name: mask.clone() for name, mask in updater.masks.items()}
        honest = updater.shards.fragment

        def careless(parameter, honest=honest, forgotten=forgotten):
            part = honest(parameter)
            if part is None:
                return None
            return replace(part, moments={}) if forgotten == "moments" else replace(part, master=part.master.clone())

        updater.shards.fragment = careless
        updater.update(2)
        updater.shards.fragment = honest
        try:
            check_update(updater, before)
            told.append("nothing")
        except AssertionError as error:
            told.append(str(error))
    return told


def disagree(engine: Engine) -> str:
    """What an update says when a bit of a mask is flipped on one rank."""
    _, _, updater, _ = make(engine, "set")
    set_weights(updater, 1)
    if dist.rank() == 1:
        updater.masks["model.layers.1.mlp.up_proj"].view(-1)[7] ^= True
    try:
        updater.update(2)
    except UserError as error:
        return str(error) if error.everywhere else "an error of one rank"
    return "nothing"


TASKS = {"updates": updates_alone, "train": train, "broken": broken, "disagree": disagree}

if __name__ == "__main__":
    engine = start(os.environ.get("PRECISION", "fp32"))
    told = {task: TASKS[task](engine) for task in sys.argv[2:]}
    everybody = dist.gather(told)
    if dist.is_main():
        Path(sys.argv[1]).write_text(json.dumps({"engine": engine.name, "ranks": everybody}))
    dist.close()
