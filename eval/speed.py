"""What the rules cost, as ratios to plain torch calls on the same machine in the same run.

    python eval/speed.py step        # a training step of LLaMA-60M, masked over dense, optimizer included
    python eval/speed.py update      # link scores and a whole topology update over bare matrix products; peak memory
    python eval/speed.py select      # selection from 45 M positions over torch.topk; peak memory
    python eval/speed.py translate   # beam search, sorted over file order; a training step (eval/speed_translate.py)

Each repetition runs every variant once, one after the other, so that a busy moment hits all alike. A ratio is the
median over the repetitions of (variant / baseline) of one repetition; times are medians too. Absolute times alone were
rejected: they say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_cht import __version__
from llm_cht.models import ModelSettings, build_model
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.initial import Given, InitialOptions, brf, er
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import ch2_l3n
from llm_cht.topology.method import Method, resolve
from llm_cht.topology.percolate import Group, Mlp, QueryKey, ValueOutput
from llm_cht.topology.select import choose, choose_missing, top_k
from llm_cht.topology.settings import MethodSettings
from llm_cht.topology.update import Inputs, Moment, update_group
from llm_cht.train.engine import Engine, EngineSettings, Precision, start_engine
from llm_cht.train.optim import OptimizerSettings, build_optimizer

Variants = Mapping[str, Callable[[], object]]

DENSITY = 0.1
ATTENTION = Group("attn", ("q", "k", "v", "o"), (QueryKey("q", "k", 8, 8, "rotary"), ValueOutput("v", "o", 8, 8)))
MLP = Group("mlp", ("gate", "up", "down"), (Mlp(("gate", "up"), "down"),))
LLAMA_60M_BLOCK = dict.fromkeys("qkvo", (512, 512)) | {"gate": (1376, 512), "up": (1376, 512), "down": (512, 1376)}


def alternate(variants: Variants, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition of each variant, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def compare(what: str, variants: Variants, repetitions: int) -> None:
    """Print one row per variant; the first is the baseline."""
    seconds = alternate(variants, repetitions)
    baseline = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, baseline, strict=True))
        print(f"| {what} | {name} | {1000 * statistics.median(times):.1f} | {ratio:.2f} |", flush=True)


def peak_mib(run: Callable[[], object]) -> float:
    """Largest memory (MiB) of this process during ``run`` beyond what it had before, BLAS's own buffers included."""
    ctypes.CDLL(None).malloc_trim(0)  # Linux only, all three: freed memory goes back to the system,
    Path("/proc/self/clear_refs").write_text("5")  # and the peak back to the present size
    before = _memory_mib("VmRSS")
    run()
    return _memory_mib("VmHWM") - before


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def bare_products(shape: tuple[int, int]) -> Callable[[], None]:
    """The four products of a CH2-L3n score, on ready fp32 inputs."""
    rows, columns = shape
    a = (torch.rand(shape) < DENSITY).float()
    e_u, e_v = torch.rand(rows, rows), torch.rand(columns, columns)
    uu, vv, s = torch.empty(rows, rows), torch.empty(columns, columns), torch.empty(shape)

    def run() -> None:
        torch.mm(a, a.T, out=uu)
        torch.mm(a.T, a, out=vv)
        torch.mm(e_u, a, out=s)
        torch.mm(a, e_v.T, out=s)

    return run


def update_table(repetitions: int) -> None:
    print("\n| what | variant | ms | ratio |\n| --- | --- | --- | --- |")
    for shape in [(512, 1376), (2048, 2048)]:
        mask = torch.rand(shape) < DENSITY
        variants: Variants = {"four bare products": bare_products(shape), "ch2_l3n": partial(ch2_l3n, mask, None, 256)}
        compare(f"score of {shape[0]} x {shape[1]}", variants, repetitions)

    method = resolve(MethodSettings(preset="chts", sparsity=1 - DENSITY), total_steps=10_000)
    targets = method.targets(LLAMA_60M_BLOCK, 0)
    masks = {
        name: brf(shape, targets[name].links, Keys(0, 0, name), _options(method), Given())
        for name, shape in LLAMA_60M_BLOCK.items()
    }
    weights = {name: torch.randn(mask.shape) * mask for name, mask in masks.items()}
    products = [bare_products(shape) for shape in LLAMA_60M_BLOCK.values()]
    variants = {
        "bare products of its 7 layers": lambda: [run() for run in products],
        "ch2_l3n of its 7 layers": lambda: [ch2_l3n(mask, None, 256) for mask in masks.values()],
        "whole update, preset chts": partial(_update, method, weights, masks),
    }
    compare("LLaMA-60M block", variants, repetitions)

    shape = (4096, 11008)
    mask = torch.rand(shape) < DENSITY
    matrix = 4 * mask.numel() / 2**20
    print("\n| ch2_l3n of 4096 x 11008 | adjacency + result, MiB | bound, MiB | peak, MiB |\n| --- | --- | --- | --- |")
    for workspace_mb in (256, 128):
        peak = peak_mib(partial(ch2_l3n, mask, None, workspace_mb))
        print(f"| workspace_mb = {workspace_mb} | {2 * matrix:.0f} | {2 * matrix + workspace_mb:.0f} | {peak:.0f} |")
    print(
        "\n| whole update of 4096 x 11008 | links | peak beyond weight and mask, MiB | s |\n| --- | --- | --- | --- |"
    )
    for sparsity in (1 - DENSITY, 0.5):
        _large_update(shape, sparsity)


def _large_update(shape: tuple[int, int], sparsity: float) -> None:
    """One layer of the MLP of LLaMA-7B: no number of links is too large for a sample."""
    method = resolve(MethodSettings(preset="chts", sparsity=sparsity), total_steps=10_000)
    mask = er(shape, method.targets({"up": shape}, 0)["up"].links, Keys(0, 0, "up"), _options(method), Given())
    weight = torch.randn(shape).mul_(mask)
    inputs = Inputs({"up": weight}, {"up": mask}, method.targets({"up": shape}, 3000))
    start = time.perf_counter()
    peak = peak_mib(partial(update_group, method, Group("up", ("up",), ()), inputs, Moment(3000, 30, 0)))
    print(
        f"| preset chts | {int(mask.count_nonzero()):,} | {peak:.0f} | {time.perf_counter() - start:.0f} |", flush=True
    )


def _options(method: Method) -> InitialOptions:
    return InitialOptions(method.settings.brf_r, method.settings.brf_degree)


def _update(method: Method, weights: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    moment = Moment(step=3000, update=30, seed=0)
    for group in (ATTENTION, MLP):
        update_group(method, group, Inputs(weights, masks, method.targets(LLAMA_60M_BLOCK, 3000)), moment)


def select_table(repetitions: int) -> None:
    keys = Keys(0, 1, "layer")
    memory = ["\n| positions | variant | peak, MiB | bytes per position |", "| --- | --- | --- | --- |"]
    print("\n| what | variant | ms | ratio |\n| --- | --- | --- | --- |")
    for shape in [(512, 1376), (1280, 3440), (4096, 11008)]:
        mask = torch.rand(shape) < DENSITY
        score_OI = torch.rand(shape).masked_fill_(mask, 0)
        score, equal, zeros = score_OI.view(-1), torch.ones(mask.numel()), torch.zeros(shape)
        num = mask.numel()
        k = num // 100
        variants: Variants = {
            "torch.topk": partial(score.topk, k, sorted=False),
            "choose, hard": partial(choose, score, k, None, keys, "remove"),
            "choose, soft": partial(choose, score, k, 1.0, keys, "remove"),
            "choose_missing, soft": partial(choose_missing, score_OI, mask, k, 1.0, keys),
            "choose_missing, all scores 0": partial(choose_missing, zeros, mask, k, 1.0, keys),
            "top_k, all equal": partial(top_k, equal, k, keys, "tie"),
        }
        compare(f"1 % of {num:,} positions", variants, repetitions)
        for name, run in variants.items():
            peak = peak_mib(run)
            memory.append(f"| {num:,} | {name} | {peak:.0f} | {peak * 2**20 / num:.0f} |")
    print("\n".join(memory))


def step_table(repetitions: int) -> None:
    print("\n| what | variant | ms | ratio |\n| --- | --- | --- | --- |")
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        engine = start_engine(EngineSettings("cpu", precision, 8, None, 1.0, 600.0, False))
        steps = {}
        for name in ("dense", "masked"):
            model = build_model(ModelSettings(), seed=0).train()
            if name == "masked":
                for number, layer in enumerate(sparsify(model, SparseSettings()).layers.values()):
                    layer.set_mask(
                        torch.rand(layer.mask.shape, generator=torch.Generator().manual_seed(number)) < DENSITY
                    )
            steps[name] = partial(_step, engine, model, build_optimizer(model, OptimizerSettings()))
        for sequences in (1, 8):
            tokens = torch.randint(0, 32000, (sequences, 256))
            variants = {name: partial(step, tokens) for name, step in steps.items()}
            compare(f"step of {sequences} x 256 tokens, {precision}", variants, repetitions)


def _step(engine: Engine, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    with engine.autocast():
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


TABLES: dict[str, Callable[[int], None]] = {"step": step_table, "update": update_table, "select": select_table}


def processor() -> str:
    """Name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def main() -> None:
    if sys.argv[1:2] == ["translate"]:  # has options of its own
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from eval import speed_translate

        return speed_translate.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--repetitions", type=int, default=20, help="of every variant (default: 20)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    versions = f"llm_cht {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; {versions}")
    print(f"`eval/speed.py {arguments.table}`: medians of {arguments.repetitions} alternated repetitions")
    return TABLES[arguments.table](arguments.repetitions)


if __name__ == "__main__":
    main()
