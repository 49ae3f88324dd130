"""First topologies: masks with exactly the asked number of links, drawn from the counter-based keys of a layer.

One signature, ``(shape, num_links, keys, options) -> mask_OI``. Memory beyond the mask is bounded: layers of 100 M
positions are drawn in blocks. Rejected: keeping each position with probability d (the count is then off), and one
``topk`` over all positions (gigabytes of temporaries, and 2**24 is the end of ``torch.multinomial``).

Letters in names: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology.keys import Keys
from llm_cht.topology.select import top_k

BLOCK = 1 << 20
"""positions drawn at a time"""


@dataclass(frozen=True)
class InitialOptions:
    """Options of the starts; each reads its own."""

    brf_r: float
    """spatial randomness, 0 (nearest inputs) to 1 (uniform)"""
    brf_degree: str
    """'fixed' (every output has the mean degree) or 'uniform' (drawn between 1 and about twice the mean)"""


def er(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions) -> Tensor:
    """Erdos-Renyi: every set of ``num_links`` positions is equally likely. Returns bool (out, in)."""
    num_outputs, num_inputs = shape
    num_positions = num_outputs * num_inputs
    assert 0 <= num_links <= num_positions, (num_links, shape)
    # Positions are drawn with replacement until enough differ; above half density the missing links are fewer.
    wanted = min(num_links, num_positions - num_links)
    mask = torch.zeros(num_positions, dtype=torch.bool)
    drawn = 0
    while short := wanted - int(mask.count_nonzero()):
        index = torch.arange(drawn, drawn + min(short, BLOCK))
        rows, columns = _below(num_outputs, keys, "row", index), _below(num_inputs, keys, "column", index)
        mask[rows * num_inputs + columns] = True
        drawn += len(index)
    return (mask if wanted == num_links else ~mask).view(shape)


def brf(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions) -> Tensor:
    """Bipartite receptive fields (002, App. D): outputs link to inputs near their own place. Returns bool (out, in).

    Output j sits at (j + 0.5) * in / out - 0.5 on the ring of inputs and draws its links without replacement with
    probability proportional to (1 + distance) ** (-(1 - r) / r).
    """
    num_outputs, num_inputs = shape
    assert 0 <= num_links <= num_outputs * num_inputs, (num_links, shape)
    degree_O = _degrees(shape, num_links, keys, options.brf_degree)
    mask = torch.zeros(shape, dtype=torch.bool)
    if num_links == 0:
        return mask
    rank = torch.arange(int(degree_O.max()))
    size = max(1, BLOCK // num_inputs)
    for part, rows in zip(mask.split(size), torch.arange(num_outputs).split(size), strict=True):
        nearest = _closeness(rows, shape, keys, options.brf_r).topk(len(rank), dim=1).indices
        part.scatter_(1, nearest, rank < degree_O[rows, None])
    return mask


STARTS: dict[str, Callable[[tuple[int, int], int, Keys, InitialOptions], Tensor]] = {"er": er, "brf": brf}


def unlinked(mask_OI: Tensor) -> tuple[int, int]:
    """How many outputs, and how many inputs, have no link."""
    return int((~mask_OI.any(dim=1)).sum()), int((~mask_OI.any(dim=0)).sum())


def repair(mask_OI: Tensor, keys: Keys) -> Tensor:
    """Move one link to each neuron without any; the number of links stays.

    A link that is moved comes from two neurons that keep others. With at least out + in links there always is one.

    Raises:
        UserError: too few links can be moved.
    """
    num_outputs, num_inputs = mask_OI.shape
    outputs, inputs = (~mask_OI.any(dim=1)).nonzero().squeeze(1), (~mask_OI.any(dim=0)).nonzero().squeeze(1)
    count = max(len(outputs), len(inputs))
    mask = mask_OI.clone()
    # One new link serves an output and an input while there are both; then any neuron may be the other end.
    mask[_filled(outputs, count, num_outputs, keys), _filled(inputs, count, num_inputs, keys)] = True
    links = mask.flatten().nonzero().squeeze(1)
    order = links[keys.bits("repair", links).argsort(stable=True)]
    outgoing, incoming = mask.sum(dim=1).tolist(), mask.sum(dim=0).tolist()
    spare: list[int] = []
    for link in chain.from_iterable(part.tolist() for part in order.split(BLOCK)):
        if len(spare) == count:
            break
        row, column = divmod(link, num_inputs)
        if outgoing[row] > 1 and incoming[column] > 1:
            outgoing[row] -= 1
            incoming[column] -= 1
            spare.append(link)
    if len(spare) < count:
        raise UserError(
            f"`method.repair`: {len(links) - count} links are too few to reach all neurons of `{keys.layer}` "
            f"({num_outputs}, {num_inputs}); lower `method.sparsity` or set `method.repair: false`"
        )
    mask.view(-1)[spare] = False
    return mask


def _degrees(shape: tuple[int, int], num_links: int, keys: Keys, rule: str) -> Tensor:
    """Links of each output, int64 (out,), ``num_links`` in total."""
    num_outputs, num_inputs = shape
    if rule == "fixed" or num_links < num_outputs:  # below one link each there is nothing to vary
        degree = torch.full((num_outputs,), num_links // num_outputs)
    else:
        mean = num_links / num_outputs
        low, high = max(1.0, 2 * mean - num_inputs), min(float(num_inputs), 2 * mean - 1)
        share = keys.uniform("degree", torch.arange(num_outputs))
        degree = (low - 0.5 + share * (high - low + 1)).round().long().clamp(1, num_inputs)
    while missing := num_links - int(degree.sum()):
        open_ = (degree < num_inputs if missing > 0 else degree > 1).nonzero().squeeze(1)
        chosen = top_k(torch.zeros(len(open_)), min(abs(missing), len(open_)), keys, "adjust", open_)
        degree[open_[chosen]] += 1 if missing > 0 else -1
    return degree


def _closeness(rows: Tensor, shape: tuple[int, int], keys: Keys, r: float) -> Tensor:
    """Noisy closeness of every input to the outputs ``rows``, fp64 (rows, in): the largest are the links."""
    num_outputs, num_inputs = shape
    inputs = torch.arange(num_inputs)
    # Distances in units of 1 / (2 * out) are whole numbers, so that inputs equally far on both sides tie exactly.
    steps = ((2 * inputs + 1) * num_outputs - (2 * rows[:, None] + 1) * num_inputs).abs()
    steps = torch.minimum(steps, 2 * num_outputs * num_inputs - steps).double()
    index = rows[:, None] * num_inputs + inputs
    if r == 0:
        return keys.uniform("link", index) - steps
    # Sampling without replacement proportional to p is taking the largest log p + Gumbel.
    return keys.gumbel("link", index) - (1 - r) / r * torch.log1p(steps / (2 * num_outputs))


def _below(bound: int, keys: Keys, purpose: str, index: Tensor) -> Tensor:
    """Random whole numbers in [0, bound), uniform up to bound / 2**32."""
    return keys.bits(purpose, index) * bound >> 32


def _filled(neurons: Tensor, count: int, num_neurons: int, keys: Keys) -> Tensor:
    """``neurons`` followed by random ones, ``count`` in all."""
    return torch.cat([neurons, _below(num_neurons, keys, "partner", torch.arange(count - len(neurons)))])
