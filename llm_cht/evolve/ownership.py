"""Who computes which group of layers in a topology update: a pure function of the groups and the number of ranks.

Groups go, the most expensive first, each to the rank with the least work so far; ties go to the lowest rank. So every
rank finds the same answer without a word. Layers of a group stay together, because percolation looks at all of them;
a model with fewer groups than there are ranks leaves the rest idle during the update.

Rejected: a cyclic deal (LLaMA's MLP groups cost 2 to 4 times its attention groups, so half of the ranks would wait).
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_cht.topology.link import cost


def group_cost(shapes: Sequence[tuple[int, int]], regrowth: str, density: float) -> float:
    """Work of one update of the layers of a group at ``density``, in FLOP where products dominate."""
    return sum(cost(regrowth, shape, density) for shape in shapes)


def owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """The rank of every group."""
    load = [0.0] * num_ranks
    owner = [0] * len(costs)
    for group in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        owner[group] = min(range(num_ranks), key=lambda rank: (load[rank], rank))
        load[owner[group]] += costs[group]
    return owner


def balance(costs: Sequence[float], owner: Sequence[int], num_ranks: int) -> float:
    """Mean load over the largest: 1 is ideal, and times the number of ranks the best possible speed-up."""
    load = [0.0] * num_ranks
    for group, rank in enumerate(owner):
        load[rank] += costs[group]
    return sum(load) / num_ranks / max(load)
