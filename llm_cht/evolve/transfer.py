"""The fp32 weights of the owned layers, from the ranks that hold pieces of them; nobody gets what it does not own.

Only the values of existing links travel: every rank knows the masks, so positions need not be sent, and at 90 %
sparsity nine tenths of the bytes stay at home. What an owner received stays packed until a group is computed, so that
a dense fp32 weight exists for one group at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_cht import dist
from llm_cht.evolve.shards import Shards
from llm_cht.sparse.linear import SparseLayer


class Weights:
    """The weights of the owned layers."""

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self._layers = layers
        self._pieces: dict[str, list[Tensor]] | None = None
        self.bytes_received = 0

    def receive(self, pieces: dict[str, list[Tensor]], bytes_received: int) -> None:
        """Take over the values of existing links, in pieces that follow each other."""
        self._pieces, self.bytes_received = pieces, bytes_received

    def dense(self, name: str) -> Tensor:
        """The fp32 weight of an owned layer, in the order of its mask, and 0 off it. Not to be written to."""
        layer = self._layers[name]
        if self._pieces is None:
            return layer.weight.detach().float()
        weight = torch.zeros_like(layer.mask, dtype=torch.float32)
        weight[layer.mask] = torch.cat(self._pieces[name])
        return weight


def gather_weights(layers: Mapping[str, SparseLayer], owner: Mapping[str, int], shards: Shards) -> Weights:
    """The weights of the layers that this rank owns; a collective where weights are cut, else nothing is sent."""
    weights = Weights(layers)
    if not shards.sharded:
        return weights
    num_ranks, me = dist.world_size(), dist.rank()
    own, outgoing = [], [[torch.empty(0)] for _ in range(num_ranks)]
    for name, layer in layers.items():
        part = shards.fragment(layer.weight)
        bounds = (0, 0) if part is None else (part.start, part.stop)
        own.append(bounds)
        if part is not None:
            links = layer.mask.view(-1)[slice(*bounds)].to(part.master.device)
            outgoing[owner[name]].append(part.master[links].to(layer.mask.device))
    bounds_of = dist.gather_counts(torch.tensor(own).view(-1)).view(num_ranks, len(own), 2).tolist()
    mine = [(i, name) for i, name in enumerate(layers) if owner[name] == me]
    counts = {
        name: [int(layers[name].mask.view(-1)[slice(*bounds_of[r][i])].count_nonzero()) for r in range(num_ranks)]
        for i, name in mine
    }
    device = next(iter(layers.values())).mask.device
    sizes = [sum(count[r] for count in counts.values()) for r in range(num_ranks)]
    received = dist.send_parts([torch.cat([p.to(device) for p in parts]) for parts in outgoing], sizes)
    pieces: dict[str, list[Tensor]] = {name: [] for name in counts}
    for r, values in enumerate(received):
        for name, part in zip(counts, values.split([count[r] for count in counts.values()]), strict=True):
            pieces[name].append(part)
    weights.receive(pieces, 4 * (sum(sizes) - sizes[me]))
    return weights
