"""How many links each layer gets: the count of a density, and how one density is shared out between layers.

Counts are exact, ``floor(d * out * in + 0.5)``, and computed here alone, so that start, updates and reports agree.
A rule maps layer shapes and the overall density to a density per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence


def num_links(shape: Sequence[int], density: float) -> int:
    """Links of a layer of ``shape`` (out, in) at ``density`` in [0, 1]; halves round up."""
    num_outputs, num_inputs = shape
    return math.floor(density * num_outputs * num_inputs + 0.5)


def uniform(shapes: Mapping[str, tuple[int, int]], density: float) -> dict[str, int]:
    """The same density for every layer (paper 002)."""
    return {name: num_links(shape, density) for name, shape in shapes.items()}


BUDGETS: dict[str, Callable[[Mapping[str, tuple[int, int]], float], dict[str, int]]] = {"uniform": uniform}
