"""What an update changed, from the owners of the layers to every rank: positions that flip, and first weights.

A byte or so per changed position (``bits.encode``) instead of masks, because an update flips a few links in a hundred.
Alone nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_cht import dist


@dataclass(frozen=True)
class Change:
    """A layer's part of the exchange."""

    code: Tensor
    """where its mask flips, uint8, by ``bits.encode``"""
    weights: Tensor | None
    """first weights of the new links, fp32, in flat order; None where all are 0"""


@dataclass(frozen=True)
class Sizes:
    """What every rank knows of a layer's change before it comes."""

    owner: int
    num_bytes: int
    num_grown: int


def exchange(
    own: Mapping[str, Change], sizes: Mapping[str, Sizes], has_weights: bool, device: torch.device
) -> Iterator[tuple[str, Change]]:
    """The changes of all layers; a collective.

    Args:
        own: of the layers that this rank owns.
        sizes: of all layers, the same on every rank.
        has_weights: whether new links come with weights.
        device: where the changes are and go.
    """
    if dist.world_size() == 1:
        yield from own.items()
        return
    by_rank = [[name for name, size in sizes.items() if size.owner == rank] for rank in range(dist.world_size())]
    mine = [own[name] for name in by_rank[dist.rank()]]
    lengths = [sum(sizes[name].num_bytes for name in names) for names in by_rank]
    codes = dist.spread(_joined([change.code for change in mine], torch.uint8, device), lengths)
    first = [change.weights for change in mine if change.weights is not None]
    counts = [sum(sizes[name].num_grown for name in names) * has_weights for names in by_rank]
    weights = dist.spread(_joined(first, torch.float32, device), counts)
    for names, joined, values in zip(by_rank, codes, weights, strict=True):
        parts = joined.split([sizes[name].num_bytes for name in names])
        starts = values.split([sizes[name].num_grown * has_weights for name in names])
        for name, code, start in zip(names, parts, starts, strict=True):
            yield name, Change(code, start if has_weights else None)


def _joined(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
