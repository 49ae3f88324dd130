"""How many links each layer gets: the count of a density, and how one density is shared out between layers.

Counts are exact, ``floor(d * out * in + 0.5)``, and computed here alone, so that start, updates and reports agree.
``er`` and ``erk`` are shared out in whole numbers: a layer's part of the links is in proportion to out + in, so that no
rounding of a float decides anything. Rejected: densities per layer, whose counts then miss the total by a few links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from llm_cht.errors import UserError

_KERNEL = {"er": 0, "erk": 2}
"""what a rule adds to out + in: the kernel of a linear layer is 1 by 1"""

BUDGETS = ("uniform", *_KERNEL)


def num_links(shape: Sequence[int], density: float) -> int:
    """Links of a layer of ``shape`` (out, in) at ``density`` in [0, 1]; halves round up."""
    num_outputs, num_inputs = shape
    return math.floor(density * num_outputs * num_inputs + 0.5)


def budget_links(shapes: Mapping[str, tuple[int, int]], density: float, budget: str) -> dict[str, int]:
    """Links of each layer at the overall ``density``; for er and erk ``floor(d * all positions + 0.5)`` in total.

    - uniform: every layer has the same density (paper 002);
    - er: the density of a layer is in proportion to (out + in) / (out * in) (003, Table 2);
    - erk: to (out + in + w + h) / (out * in * w * h), with w = h = 1 for a linear layer (003 leaves w + h out).

    A layer that would exceed density 1 is full, and the others share what is left. No layer gains links when the
    density falls.

    Args:
        shapes: (out, in) by layer name.
        density: links over positions of all layers together, in [0, 1].
        budget: one of ``BUDGETS``.

    Raises:
        UserError: a layer would get no link.
    """
    if budget == "uniform":
        links = {name: num_links(shape, density) for name, shape in shapes.items()}
    else:
        sizes = {name: num_outputs * num_inputs for name, (num_outputs, num_inputs) in shapes.items()}
        weights = {name: sum(shape) + _KERNEL[budget] for name, shape in shapes.items()}
        links = _share(math.floor(density * sum(sizes.values()) + 0.5), weights, sizes)
    for name, count in links.items():
        if count < 1:
            raise UserError(
                f"`method.sparsity` = {round(1 - density, 12)} leaves no link in `{name}` {shapes[name]} under "
                f"`method.budget` = {budget}; lower it"
            )
    return links


def _share(total: int, weights: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Whole parts of ``total`` in proportion to ``weights``, none above its size.

    The k-th link of a layer has its turn at (k - 1/2) / weight (Webster's method): parts are then rounded to the
    nearest number, and no part grows when the total falls, which largest remainders do not promise.
    """
    full: set[str] = set()
    while True:
        left = total - sum(sizes[name] for name in full)
        weight = sum(weights[name] for name in weights if name not in full)
        over = {name for name in weights if name not in full and left * weights[name] > sizes[name] * weight}
        if not over:
            break
        full |= over
    parts = {
        name: sizes[name] if name in full else min(sizes[name], (2 * left * weights[name] + weight) // (2 * weight))
        for name in weights
    }
    order = {name: place for place, name in enumerate(weights)}

    def turn(name: str, link: int) -> tuple[Fraction, int]:
        return Fraction(2 * link - 1, weights[name]), order[name]

    while (odd := total - sum(parts.values())) != 0:
        if odd > 0:
            parts[min((n for n in parts if parts[n] < sizes[n]), key=lambda n: turn(n, parts[n] + 1))] += 1
        else:
            parts[max((n for n in parts if parts[n] > 0), key=lambda n: turn(n, parts[n]))] -= 1
    return parts
