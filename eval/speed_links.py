"""How fast the link predictors are, and how the time of an update grows with size and density.

    python -m eval.speed_links paths      # CH3-L3p over a numpy loop over the links, 1 % of the links
    python -m eval.speed_links growth     # a CH2-L3n update of an n x n layer; slopes, and a picture of them

``paths``: ratios as in ``eval/speed.py``; both sides are fp32. ``growth``: a whole update of one layer (preset chts,
without percolation, for a lone layer has none), with the dense and the sparse way of the rule each forced, so that no
line straddles the density at which the rule goes from one to the other. A slope is that of the straight line through
the logarithms of size (or density) and least time: the least, for that is the time without what else the machine does.
Rejected: medians, which bend the line wherever the machine was busy for one size.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure

from eval.speed import Variants, alternate, compare, processor
from llm_cht import __version__
from llm_cht.topology import node_rules
from llm_cht.topology.budget import num_links
from llm_cht.topology.initial import Given, InitialOptions, er
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import PREDICTORS
from llm_cht.topology.method import resolve
from llm_cht.topology.percolate import Group
from llm_cht.topology.settings import MethodSettings
from llm_cht.topology.update import Inputs, Moment, update_group
from tests.topology.numpy_loop import path_scores_by_loop

DENSE, SPARSE = 0.0, 1.1  # the density below which the sparse way is taken, to force one of the two
DENSITY, DEGREE = 0.1, 16
PICTURE = Path(__file__).parent / "results" / "growth.png"


@dataclass(frozen=True)
class Line:
    """Updates along one variable; points are (variable, neurons a side, density)."""

    name: str
    way: float
    points: list[tuple[float, int, float]]
    bound: float | None = None


def paths_table(repetitions: int) -> None:
    print("\n| what | variant | ms | ratio |\n| --- | --- | --- | --- |")
    for shape in [(784, 1568), (1568, 1568)]:
        mask = torch.rand(shape) < 0.01
        variants: Variants = {
            "ch3_l3p": partial(PREDICTORS["ch3_l3p"], mask, None, 256),
            "numpy, an outer product a link": partial(path_scores_by_loop, mask.numpy()),
        }
        compare(f"score of {shape[0]} x {shape[1]}, 1 %", variants, repetitions)


def growth_table(repetitions: int, largest: int, picture: Path) -> None:
    sizes = [size for size in (256, 512, 1024, 2048, 4096) if size <= largest]
    fixed = min(1024, largest)
    densities = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
    panels = {
        "neurons a side": [
            Line(f"products, {DENSITY:.0%}", DENSE, [(n, n, DENSITY) for n in sizes], 3.05),
            Line(f"sums of rows, {DENSITY:.0%}", SPARSE, [(n, n, DENSITY) for n in sizes], 3.05),
            Line(f"sums of rows, {DEGREE} links a neuron", SPARSE, [(n, n, DEGREE / n) for n in sizes], 2.2),
        ],
        "density": [
            Line(f"products, {fixed} x {fixed}", DENSE, [(d, fixed, d) for d in densities]),
            Line(f"sums of rows, {fixed} x {fixed}", SPARSE, [(d, fixed, d) for d in densities]),
        ],
    }
    print("\n| line | points, ms | slope | bound |\n| --- | --- | --- | --- |")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (variable, lines) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for line in lines:
            seconds = [least_seconds(line.way, n, density, repetitions) for _, n, density in line.points]
            at = [point[0] for point in line.points]
            slope = float(np.polyfit(np.log(at), np.log(seconds), 1)[0])
            points = ", ".join(f"{x:g}: {1000 * s:.1f}" for x, s in zip(at, seconds, strict=True))
            print(f"| {line.name}, by {variable} | {points} | {slope:.2f} | {line.bound or ''} |", flush=True)
            axes.loglog(at, seconds, "o-", label=f"{line.name}: slope {slope:.2f}")
        axes.set_xlabel(variable)
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_ylabel("seconds an update")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(picture, dpi=150)


def least_seconds(way: float, size: int, density: float, repetitions: int) -> float:
    """Least time of an update of a ``size`` x ``size`` layer."""
    method = resolve(MethodSettings(preset="chts", sparsity=1 - density, initial="er"), total_steps=10_000)
    shapes = {"layer": (size, size)}
    mask = er(
        shapes["layer"], num_links(shapes["layer"], density), Keys(0, 0, "layer"), InitialOptions(0.2, "fixed"), Given()
    )
    inputs = Inputs({"layer": torch.randn(size, size) * mask}, {"layer": mask}, method.targets(shapes, 3000))
    moment = Moment(step=3000, update=30, seed=0)
    run = partial(update_group, method, Group("layer", ("layer",), ()), inputs, moment)
    with patch.object(node_rules, "SPARSE_BELOW", way):
        return min(alternate({"update": run}, repetitions)["update"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["paths", "growth"])
    parser.add_argument("--repetitions", type=int, default=10, help="of every variant (default: 10)")
    parser.add_argument("--largest", type=int, default=4096, help="growth: neurons a side (default: 4096)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="growth: where it goes (default: eval/results)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    versions = f"llm_cht {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; {versions}")
    print(f"`eval/speed_links.py {arguments.table}`, {arguments.repetitions} repetitions")
    if arguments.table == "paths":
        paths_table(arguments.repetitions)
    else:
        growth_table(arguments.repetitions, arguments.largest, arguments.picture)


if __name__ == "__main__":
    main()
