"""Density decay across layers: how many links each keeps when those of all layers are compared with each other.

The owners hold the scores, and nobody gets those of others: the smallest score that is kept is found digit by digit, 16
bits at a time, from histograms that are summed over the ranks (half a megabyte each). Exact, and the same on any number
of ranks. Rejected: gathering the scores (gigabytes for a large model), and a threshold by bisection (not exact).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm_cht import dist

_BINS = 1 << 16


def links_of_layers(scores: Mapping[str, Tensor], layers: Sequence[str], total: int) -> dict[str, int]:
    """How many links each of ``layers`` keeps, at least 1 and ``total`` in all; a collective.

    Of equal scores at the limit the first layers keep theirs.

    Args:
        scores: fp32, at least 0, of the links of the layers that this rank owns.
        layers: all layers, in the order of the model, the same on every rank.
        total: links to keep, at least one a layer and at most as many as there are.
    """
    # the bits of a number that is not negative are in the order of the numbers
    bits = {name: score.float().view(torch.int32).cpu().long() for name, score in scores.items()}
    high, above = _digit([value >> 16 for value in bits.values()], total)
    low, within = _digit([value[value >> 16 == high] & 0xFFFF for value in bits.values()], total - above)
    limit, above = high << 16 | low, above + within
    larger_and_equal = torch.zeros(len(layers), 2, dtype=torch.int64)
    for row, name in enumerate(layers):
        if name in bits:
            larger_and_equal[row] = torch.stack([(bits[name] > limit).sum(), (bits[name] == limit).sum()])
    kept = {}
    left = total - above
    for name, (larger, equal) in zip(layers, dist.total_counts(larger_and_equal).tolist(), strict=True):
        taken = min(left, equal)
        kept[name] = larger + taken
        left -= taken
    for name in layers:
        if kept[name] == 0:  # a layer without a link would cut the model
            kept[max(kept, key=lambda other: kept[other])] -= 1
            kept[name] = 1
    return kept


def _digit(values: Sequence[Tensor], wanted: int) -> tuple[int, int]:
    """The digit of the ``wanted``-th largest of all ranks' values, and how many have a larger one."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for digits in values:
        counts += torch.bincount(digits, minlength=_BINS)
    counts = dist.total_counts(counts)
    reached = counts.flip(0).cumsum(0).flip(0)  # by this digit or a larger one
    digit = int((reached >= wanted).nonzero().max())
    return digit, int(reached[digit] - counts[digit])
