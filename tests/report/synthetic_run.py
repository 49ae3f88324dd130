"""A run folder as training leaves it, made up in a second: deterministic, realistic enough to look at."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_cht.sparse.folder import write_topology

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of the made-up run."""

    blocks: int = 2
    hidden: int = 64
    inner: int = 172
    steps: int = 400
    interval: int = 20
    every: int = 5


SMALL = Shape()
LARGE = Shape(blocks=8, hidden=512, inner=1376, steps=10_000, interval=100, every=10)  # as LLaMA-60M


def layer_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    names = {}
    for block in range(shape.blocks):
        for kind in KINDS:
            room = "mlp" if kind in KINDS[4:] else "self_attn"
            size = {"gate_proj": (shape.inner, shape.hidden), "up_proj": (shape.inner, shape.hidden)}.get(
                kind, (shape.hidden, shape.inner) if kind == "down_proj" else (shape.hidden, shape.hidden)
            )
            names[f"model.layers.{block}.{room}.{kind}"] = size
    return names


def band_mask(shape: tuple[int, int], density: float, random: torch.Generator) -> Tensor:
    """Receptive fields: links near the diagonal are likelier."""
    out, inputs = shape
    centre = (torch.arange(out)[:, None] + 0.5) * inputs / out - 0.5
    distance = (torch.arange(inputs)[None] - centre).abs()
    distance = torch.minimum(distance, inputs - distance)
    weight = -2.0 * torch.log1p(distance / 12)
    return _draw(weight, density, random)


def hub_mask(shape: tuple[int, int], density: float, random: torch.Generator) -> Tensor:
    """Some neurons gather links, others lose them all; a trace of the band stays."""
    out, inputs = shape
    rows = 1.1 * torch.randn(out, 1, generator=random)
    columns = 0.9 * torch.randn(1, inputs, generator=random)
    mask = _draw(rows + columns, density, random)
    return mask & (rows > -2.2) & (columns > -2.0)


def _draw(log_weight: Tensor, density: float, random: torch.Generator) -> Tensor:
    gumbel = -torch.log(-torch.log(torch.rand(log_weight.shape, generator=random).clamp(1e-9, 1 - 1e-7)))
    chosen = (log_weight + gumbel).flatten().topk(int(density * log_weight.numel() + 0.5)).indices
    mask = torch.zeros(log_weight.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(log_weight.shape)


def make_run(run: Path, preset: str = "chtss", ended: bool = True, shape: Shape = SMALL) -> Path:
    """Write ``run``; ``preset`` is dense, static, chts (constant density) or chtss (sigmoid density)."""
    run.mkdir(parents=True)
    run.joinpath("config.yaml").write_text(
        f"run: {run.name}\nmethod:\n  preset: {preset}\n  sparsity: 0.9\n  note: <script>alert(1)</script> & more\n"
    )
    random = torch.Generator().manual_seed(0)
    shapes = {} if preset == "dense" else layer_shapes(shape)
    if shapes:
        first = 0.5 if preset == "chtss" else 0.1
        masks = {name: band_mask(size, first, random) for name, size in shapes.items()}
        write_topology(run, masks, preset, 0, stem="topology_start")
        if ended:
            last = masks if preset == "static" else {n: hub_mask(size, 0.1, random) for n, size in shapes.items()}
            run.joinpath("model").mkdir()
            write_topology(run / "model", last, preset, shape.steps)
    records = make_records(preset, ended, shape, shapes)
    run.joinpath("metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def make_records(preset: str, ended: bool, shape: Shape, shapes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0)
    positions = sum(out * inputs for out, inputs in shapes.values())
    end_step = shape.steps * 3 // 4
    updates = [] if preset in ("dense", "static") else range(shape.interval, end_step + 1, shape.interval)
    stop = shape.steps if ended else shape.steps * 6 // 10
    first = 0.5 if preset == "chtss" else 0.1
    records = [_start(shapes, positions, first)]
    density, last_update, total, pruned_before = (first if shapes else 1.0), None, 0.0, first
    for step in range(1, stop + 1):
        total += density
        if step in updates:
            density = _density(preset, step, end_step)
            pruned = round((pruned_before - density) * positions)
            pruned_before = density
            records.append(_topology(step, end_step, density, pruned, shapes, noise))
        if step % shape.every == 0 or step in (1, stop) or step - 1 == last_update:
            records.append(_train(step, shape, density, total / step, last_update, noise))
        if step in updates:
            last_update = step
        if step % (shape.steps // 10) == 0 and step < stop:
            records.append(_validation(step, shape, full=False))
    if ended:
        records.append(_validation(stop, shape, full=True))
        summary = {
            "perplexity": records[-1]["perplexity"],
            "unigram_perplexity": 812.4,
            "average_density": total / stop,
            "flops_relative": 0.4 + 0.6 * total / stop,
        }
        records.append({"kind": "end", **_when(stop), "summary": summary})
    return records


def _when(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * 131_072, "seconds": round(step * 1.37, 3)}


def _start(shapes: dict[str, tuple[int, int]], positions: int, density: float) -> dict[str, Any]:
    return {
        "kind": "start",
        **_when(0),
        "parameters": int(positions * 1.3) + 16_384_000,
        "sparse_parameters": positions,
        "layers": {name: {"shape": list(size), "sparsity": 1 - density} for name, size in shapes.items()},
        "unlinked": {"outputs": 0, "inputs": 0},
        "device": "cpu",
        "dtype": "bf16",
        "world_size": 1,
        "threads": 2,
        "versions": {"llm_cht": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.9"},
    }


def _density(preset: str, step: int, end_step: int) -> float:
    if preset != "chtss":
        return 0.1
    u = min(1.0, step / (end_step / 2))
    edge = 1 / (1 + np.exp(6))
    g = (1 / (1 + np.exp(-6 * (2 * u - 1))) - edge) / (1 - 2 * edge)
    return float(0.5 - 0.4 * g)


def _topology(
    step: int,
    end_step: int,
    density: float,
    pruned: int,
    shapes: dict[str, tuple[int, int]],
    noise: np.random.Generator,
) -> dict[str, Any]:
    done = step / end_step
    links = round(density * sum(out * inputs for out, inputs in shapes.values()))
    removed, percolated = links // 10, int(links * 0.004 * noise.uniform(0.6, 1.4) * (1 + done))
    layers = {}
    for i, name in enumerate(shapes):
        kind = i % len(KINDS)
        itop = 0.5 + 0.3 * (1 - np.exp(-(1 + 0.15 * kind) * done)) + 0.004 * (i // len(KINDS))
        overlap = 0.15 + (0.5 + 0.03 * kind) * done + noise.normal(0, 0.01)
        layers[name] = {"sparsity": 1 - density, "itop": float(itop), "overlap": float(overlap)}
    return {
        "kind": "topology",
        **_when(step),
        "update": step,
        "seconds_update": float(2.1 * noise.lognormal(0, 0.05)),
        "zeta": 0.1,
        "temperature": 1 + 8 * done,
        "density": density,
        "removed": removed,
        "regrown": removed + percolated,
        "pruned": pruned,
        "percolated": percolated,
        "overlap": _mean(layers, "overlap"),
        "anp": float(1 - 0.12 * done**2),
        "itop": _mean(layers, "itop"),
        "itop_mean": _mean(layers, "itop"),
        "layers": layers,
    }


def _mean(layers: dict[str, dict[str, float]], name: str) -> float:
    return float(np.mean([layer[name] for layer in layers.values()]))


def _train(
    step: int, shape: Shape, density: float, average: float, last_update: int | None, noise: np.random.Generator
) -> dict[str, Any]:
    warmup = shape.steps // 10
    base = 3e-3 * min(step / warmup, 0.1 + 0.45 * (1 + np.cos(np.pi * max(0, step - warmup) / (shape.steps - warmup))))
    rewarm = 1.0 if last_update is None else min(1.0, (step - last_update) / 20)
    return {
        "kind": "train",
        **_when(step),
        "loss": _loss(step, shape) + float(noise.normal(0, 0.05)),
        "lr": base * rewarm,
        "rewarm": rewarm,
        "grad_norm": float(noise.lognormal(-0.5, 0.2)),
        "tokens_per_second": float(noise.normal(95_000, 900)),
        "peak_memory_mb": 6400.0 + 500 * min(1.0, step / shape.interval),
        "density": density,
        "average_density": average,
        "flops": 1e12 * step * (0.4 + 0.6 * average),
    }


def _loss(step: int, shape: Shape) -> float:
    return 3.35 + 7.0 * (1 + 60 * step / shape.steps) ** -0.9


def _validation(step: int, shape: Shape, full: bool) -> dict[str, Any]:
    loss = _loss(step, shape) + 0.06
    values = {"loss": loss, "perplexity": float(np.exp(loss)), "validation_tokens": 500_000, "full": full}
    return {"kind": "validation", **_when(step), **values}


def main(arguments: Sequence[str]) -> None:
    """Make a large run and its page, to be looked at: ``python synthetic_run.py FOLDER PRESET [unfinished]``."""
    from llm_cht.report.page import write_report

    print(write_report(make_run(Path(arguments[0]), arguments[1], ended=len(arguments) < 3, shape=LARGE)))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
