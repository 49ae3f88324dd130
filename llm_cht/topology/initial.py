"""First topologies: masks with exactly the asked number of links, drawn from the counter-based keys of a layer.

One signature, ``(shape, num_links, keys, options, given) -> mask_OI``, for the rows of ``STARTS``; masks are drawn on
the CPU, so that they are the same on every device. Memory beyond the mask is bounded: layers of 100 M positions are
drawn in blocks. Rejected: keeping each position with probability d (the count is then off), and one ``topk`` over all
positions (gigabytes of temporaries, and 2**24 is the end of ``torch.multinomial``).

Letters in names: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology import correlated, scale_free
from llm_cht.topology.keys import Keys
from llm_cht.topology.score import SCORES
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
    bsw_beta: float = 0.25
    """probability that a link is rewired, 0 (the nearest inputs) to 1 (er)"""
    bsf_equal_partition: bool = False
    """level the degrees of the inputs"""
    bsf_resort: bool = False
    """sort neurons by degree"""
    pruning: str = "magnitude"
    """score of the weights that ``checkpoint`` keeps, a name in ``SCORES``: magnitude or relative_importance"""


@dataclass(frozen=True)
class Given:
    """What a start is made of beside random numbers; each reads its own."""

    weight_OI: Tensor | None = None
    """dense weight (out, in) for ``checkpoint``"""
    correlation_II: Tensor | None = None
    """correlations between input features (in, in) for ``csti``, from ``correlated.Correlation``"""
    mask_OI: Tensor | None = None
    """links, bool (out, in), for ``file``"""


def er(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
    """Erdos-Renyi: every set of ``num_links`` positions is equally likely. Returns bool (out, in)."""
    assert 0 <= num_links <= shape[0] * shape[1], (num_links, shape)
    return _scatter(torch.zeros(shape, dtype=torch.bool), num_links, keys)


def brf(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
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


def bsw(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
    """Bipartite small world (000, App. M; 002, App. D): nearest inputs, then rewired. Returns bool (out, in).

    Each link of ``brf`` with r = 0 and fixed degrees moves with probability beta to a uniformly drawn free position.
    Positions left by moving links are free too, so that beta = 1 gives ``er``.
    """
    mask = brf(shape, num_links, keys, replace(options, brf_r=0.0, brf_degree="fixed"), given)
    flat = mask.view(-1)
    for begin in range(0, len(flat), BLOCK):
        links = flat[begin : begin + BLOCK].nonzero().squeeze(1) + begin
        flat[links[keys.uniform("rewire", links) < options.bsw_beta]] = False
    return _scatter(mask, num_links - int(flat.count_nonzero()), keys)


def bsf(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
    """Bipartite scale-free network (000, App. M). Returns bool (out, in)."""
    return scale_free.bsf(shape, num_links, keys, options.bsf_equal_partition, options.bsf_resort)


def csti(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
    """Links between correlated input features (000, App. B). Returns bool (out, in); raises ``UserError``."""
    assert given.correlation_II is not None
    return correlated.csti(shape, num_links, keys, given.correlation_II)


def file(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
    """The given mask. Returns bool (out, in).

    Raises:
        UserError: it has another shape, or another number of links.
    """
    assert given.mask_OI is not None
    if tuple(given.mask_OI.shape) != shape:
        raise UserError(
            f"`method.initial` = file: the mask of `{keys.layer}` is {tuple(given.mask_OI.shape)}, the layer {shape}; "
            "give the topology of a model of the same dimensions"
        )
    if (links := int(given.mask_OI.count_nonzero())) != num_links:
        raise UserError(
            f"`method.initial` = file: the mask of `{keys.layer}` has {links} links, the method asks for {num_links}; "
            f"set `method.sparsity` and `method.budget` to those of the file (here {1 - links / math.prod(shape):.6g})"
        )
    return given.mask_OI.bool().cpu()


def checkpoint(shape: tuple[int, int], num_links: int, keys: Keys, options: InitialOptions, given: Given) -> Tensor:
    """The largest weights of a dense checkpoint, by ``options.pruning``. Returns bool (out, in).

    Raises:
        UserError: a weight is not finite.
    """
    assert given.weight_OI is not None
    assert given.weight_OI.shape == shape, (given.weight_OI.shape, shape)
    everywhere = torch.ones((), dtype=torch.bool, device=given.weight_OI.device).expand(shape)
    score_OI = SCORES[options.pruning](given.weight_OI, everywhere, None, 1.0)
    if num_links and not score_OI.max().isfinite():  # NaN is the largest of all
        raise UserError(
            f"`method.initial` = checkpoint: the weight of `{keys.layer}` is not finite everywhere; give a sound one"
        )
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[top_k(score_OI.view(-1), num_links, keys, "tie").cpu()] = True
    return mask


Start = Callable[[tuple[int, int], int, Keys, InitialOptions, Given], Tensor]

STARTS: dict[str, Start] = {
    "er": er,
    "brf": brf,
    "bsw": bsw,
    "bsf": bsf,
    "csti": csti,
    "file": file,
    "checkpoint": checkpoint,
}


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


def _scatter(mask_OI: Tensor, count: int, keys: Keys) -> Tensor:
    """``mask_OI`` with ``count`` more links, at uniformly drawn free positions."""
    num_outputs, num_inputs = mask_OI.shape
    taken = mask_OI.reshape(-1)
    num_free = taken.numel() - int(taken.count_nonzero())
    # Whichever are fewer are drawn: the new links, or the free positions that stay so.
    wanted = min(count, num_free - count)
    if 16 * num_free < taken.numel():  # blind draws would seldom hit a free one
        free = (~taken).nonzero().squeeze(1)
        drawn = taken.clone()
        drawn[free[top_k(torch.zeros(len(free)), wanted, keys, "free", free)]] = True
    else:
        drawn = taken.clone()
        goal, used = taken.numel() - num_free + wanted, 0
        while short := goal - int(drawn.count_nonzero()):
            index = torch.arange(used, used + min(short, BLOCK))
            row, column = keys.below("row", index, num_outputs), keys.below("column", index, num_inputs)
            drawn[row * num_inputs + column] = True
            used += len(index)
    # drawn ^ taken are the drawn ones; their complement includes the links that were there.
    return (drawn if wanted == count else ~(drawn ^ taken)).view_as(mask_OI)


def _filled(neurons: Tensor, count: int, num_neurons: int, keys: Keys) -> Tensor:
    """``neurons`` followed by random ones, ``count`` in all."""
    return torch.cat([neurons, keys.below("partner", torch.arange(count - len(neurons)), num_neurons)])
