"""What many ranks cost and gain, as ratios of things measured in turn in one run; started by a launcher.

    OMP_NUM_THREADS=1 accelerate launch --config_file launch/accelerate/zero2.yaml --num_processes 2 \\
      --module eval.speed_ranks update     # one topology update, computed by one rank and by all; bytes exchanged
      --module eval.speed_ranks step       # or: a training step of the masked model over the dense one
    python -m eval.speed_ranks balance     # predicted balance of the owners, no launcher

Never start more processes than there are cores. On GPUs add ``--device cuda --model llama_1b``.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from eval.speed import alternate, processor
from llm_cht import __version__, dist
from llm_cht.evolve.ownership import balance, group_cost, owners
from llm_cht.evolve.start import draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.models import ModelSettings, build_model
from llm_cht.sparse.surgery import SparseModel, SparseSettings, sparsify
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings
from llm_cht.train.engine import Engine, EngineSettings, start_engine
from llm_cht.train.optim import OptimizerSettings, build_optimizer

STEPS = 10_000


def say(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)


def prepared(engine: Engine, model_name: str, sparse: bool) -> tuple[Any, Any, Any, SparseModel | None]:
    """The model as called, where its weights are, its optimizer, and its sparse layers with a first topology."""
    model = build_model(ModelSettings(config=model_name), seed=0).train()
    layers = None
    if sparse:
        layers = sparsify(model, SparseSettings())
        draw_start(layers, method_of("chts"), 0)
    optimizer = build_optimizer(model, OptimizerSettings())
    if not engine.zero_stage:
        model.to(engine.device)
    forward, shards = engine.prepare(model, model, optimizer)
    return forward, shards, optimizer, layers


def method_of(preset: str) -> Any:
    return resolve(MethodSettings(preset=preset, sparsity=0.9), STEPS)


def update_table(engine: Engine, model_name: str, repetitions: int) -> None:
    _, shards, _, layers = prepared(engine, model_name, sparse=True)
    assert layers is not None
    shared = TopologyUpdater(layers, method_of("chts"), shards, 0)
    with patch("llm_cht.evolve.updater.owners", lambda costs, ranks: [0] * len(costs)):
        alone = TopologyUpdater(layers, method_of("chts"), shards, 0)
    told: dict[str, list[dict[str, Any]]] = {"one owner": [], "all ranks": []}
    for number in range(1, repetitions + 2):  # the first does not count
        for name, updater in (("one owner", alone), ("all ranks", shared)):
            draw_weights(updater, number)
            figures = updater.update(100 * number)
            if number > 1:
                told[name].append(figures)
    say(
        f"\n| update of {model_name}, {engine.name}, {dist.world_size()} ranks | compute, s | gather, s | exchange, s |"
    )
    say("| --- | --- | --- | --- |")
    for name, runs in told.items():
        phases = [
            statistics.median(max(run[f"seconds_{p}"]) for run in runs) for p in ("compute", "gather", "exchange")
        ]
        say(f"| {name} | " + " | ".join(f"{seconds:.3f}" for seconds in phases) + " |")
    pairs = zip(told["one owner"], told["all ranks"], strict=True)
    gains = [max(a["seconds_compute"]) / max(b["seconds_compute"]) for a, b in pairs]
    ideal = shared.balance * dist.world_size()
    say(f"\nspeed-up of the compute phase: {statistics.median(gains):.2f}; ideal of the ownership: {ideal:.2f}; "
        f"their ratio: {statistics.median(gains) / ideal:.2f} (median of {repetitions})")  # fmt: skip
    bytes_table(layers, told["all ranks"][-1])


def draw_weights(updater: TopologyUpdater, seed: int) -> None:
    """Weights of existing links as if the model had trained: without, new links would all go at the next update."""
    generator = torch.Generator().manual_seed(seed)
    for layer in updater.sparse.layers.values():
        drawn = torch.randn(layer.mask.shape, generator=generator).to(layer.mask.device) * layer.mask
        updater.shards.load(layer.weight, partial(_part, drawn.view(-1)))


def _part(values: Tensor, start: int, stop: int) -> Tensor:
    return values[start:stop]


def bytes_table(layers: SparseModel, figures: dict[str, Any]) -> None:
    positions = sum(layer.mask.numel() for layer in layers.layers.values())
    links = round(figures["density"] * positions)
    moved = round(figures["regrown"] * (1 - figures["overlap"]))  # the others came back to where they were
    weights = 4 * moved
    floor = (_choices(links, moved) + _choices(positions - links, moved)) / 8
    rows = {
        "which positions flip, and first weights of links": figures["bytes_exchanged"],
        "the same, ideally coded": floor + weights,
        "masks as fp32": 4 * positions,
        "weights gathered to the owners": figures["bytes_gathered"],
    }
    say("\n| bytes of one update | MB | bits a position |\n| --- | --- | --- |")
    for name, count in rows.items():
        say(f"| {name} | {count / 1e6:.2f} | {8 * count / positions:.3f} |")


def _choices(count: int, taken: int) -> float:
    """Bits that tell which ``taken`` of ``count``."""
    return (math.lgamma(count + 1) - math.lgamma(taken + 1) - math.lgamma(count - taken + 1)) / math.log(2)


def step_table(engine: Engine, model_name: str, repetitions: int) -> None:
    models = {name: prepared(engine, model_name, sparse=name == "masked") for name in ("dense", "masked")}
    say(f"\n| step of {model_name}, {engine.name}, {dist.world_size()} ranks | variant | ms | ratio |")
    say("| --- | --- | --- | --- |")
    tokens = torch.randint(0, 32_000, (8 // dist.world_size(), 256), device=engine.device)
    seconds = alternate({name: partial(_step, engine, m[0], m[2], tokens) for name, m in models.items()}, repetitions)
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["dense"], strict=True))
        where = f"8 x 256 tokens over all ranks, {engine.settings.precision}"
        say(f"| {where} | {name} | {1000 * statistics.median(times):.0f} | {ratio:.2f} |")


def _step(engine: Engine, forward: Any, optimizer: Any, tokens: Tensor) -> None:
    with engine.accumulate(forward, last=True):
        with engine.autocast():
            loss = forward(tokens, labels=tokens, use_cache=False).loss
        engine.backward(forward, loss)
    engine.step(forward, optimizer)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def balance_table() -> None:
    print(
        "\n| model | groups | ranks | balance (mean over largest load) | speed-up at best |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for name in ("llama_60m", "llama_1b", "llama_7b"):
        with torch.device("meta"):  # no memory for 7 billion weights
            sparse = sparsify(build_model(ModelSettings(config=name), seed=0), SparseSettings())
        shapes = {n: (layer.out_features, layer.in_features) for n, layer in sparse.layers.items()}
        costs = [group_cost([shapes[n] for n in group.layers], "ch2_l3n") for group in sparse.groups]
        for ranks in (2, 8, 64, 512):
            share = balance(costs, owners(costs, ranks), ranks)
            print(f"| {name} | {len(costs)} | {ranks} | {share:.3f} | {share * ranks:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["update", "step", "balance"])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    if options.table == "balance":
        balance_table()
        return
    world = EngineSettings(options.device, options.precision, 8, 1, 1.0, 600.0, False)
    engine = start_engine(world)
    what = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    say(f"{what}, {torch.get_num_threads()} threads a rank, torch {torch.__version__}, Python "
        f"{platform.python_version()}, llm_cht {__version__}, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    {"update": update_table, "step": step_table}[options.table](engine, options.model, options.repetitions)
    dist.close()


if __name__ == "__main__":
    main()
