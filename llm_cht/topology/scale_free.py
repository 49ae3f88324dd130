"""Bipartite scale-free start (BSF; 000 App. M, 002 App. D and E): few hubs, many neurons of few links.

A Barabasi-Albert graph grows over all neurons of both sides, in random order. Its links between the sides stay. A link
within a side is broken into two stubs, one at each of its neurons; the stubs of one side are then joined to those of
the other, which is the papers' rewiring of two such links into two that cross, and keeps every degree. What the larger
side has left over is joined to the smaller side by preferential attachment.

The Barabasi-Albert graph gets links * (in + out) / (2 max(in, out)) links: the degrees of the larger side then
add up to the asked number and are kept; those of the smaller side grow. With in = out this is links / (in + out) per
node. Rejected for in != out: the same there, under which a third and more of the larger side's stubs would be lost.

Only degrees and stubs are stored beside the mask, no list of links. Loops go over neurons; what a neuron does is one
selection over the other side. Rejected: rewiring link by link (hours in Python), and random pairs of stubs with the
repeated ones drawn again, which stalls when only hubs are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_cht.topology.keys import Keys
from llm_cht.topology.select import choose, top_k


def bsf(shape: tuple[int, int], num_links: int, keys: Keys, equal_partition: bool, resort: bool) -> Tensor:
    """Draw a bipartite scale-free mask, bool (out, in), with exactly ``num_links`` links.

    Args:
        shape: (out, in).
        num_links: at most out * in.
        keys: random numbers of the layer.
        equal_partition: level the degrees of the inputs, keep those of the outputs (002, App. E).
        resort: sort the neurons of both sides by falling degree, so that hubs meet hubs in the next layer (ibid.).
    """
    num_outputs, num_inputs = shape
    assert 0 <= num_links <= num_outputs * num_inputs, (num_links, shape)
    graph = _Graph(torch.zeros(shape, dtype=torch.bool), keys)
    stub_O, stub_I = _grow(graph, num_links)
    _join(graph, stub_O, stub_I)
    _attach_stubs(graph, stub_O, stub_I, num_links)
    _fill(graph, num_links)
    mask = _level_inputs(graph.mask, keys) if equal_partition else graph.mask
    if resort:
        mask = mask[mask.sum(dim=1).argsort(descending=True, stable=True)]
        mask = mask[:, mask.sum(dim=0).argsort(descending=True, stable=True)]
    return mask


@dataclass(frozen=True)
class _Graph:
    """A mask that fills up, one neuron at a time."""

    mask: Tensor
    keys: Keys

    def link(self, neuron: int, side: int, count: int, weight: Tensor, purpose: str) -> Tensor:
        """Give ``neuron`` of ``side`` (0 outputs, 1 inputs) up to ``count`` new links, to partners drawn by ``weight``.

        Returns the partners: of the missing ones, in proportion to their fp32 weight, weight 0 last.
        """
        row = self.mask.select(side, neuron)
        free = (~row).nonzero().squeeze(1)
        index = neuron * len(row) + free
        partners = free[choose(weight[free], min(count, len(free)), 1.0, self.keys, purpose, index)]
        row[partners] = True
        return partners

    def degrees(self, side: int) -> Tensor:
        return self.mask.sum(dim=1 - side)


def _grow(graph: _Graph, num_links: int) -> tuple[Tensor, Tensor]:
    """Grow a Barabasi-Albert graph; enter its links between the sides and return the stubs of the others by neuron."""
    num_outputs, num_inputs = graph.mask.shape
    num_nodes = num_outputs + num_inputs
    # Node t of the growing graph is this neuron: an output, or (from num_outputs on) an input.
    neuron = graph.keys.bits("side", torch.arange(num_nodes)).argsort(stable=True)
    is_output = neuron < num_outputs
    degree, stubs = torch.zeros(num_nodes), torch.zeros(num_nodes, dtype=torch.int64)
    for node, count in enumerate(_new_links(num_nodes, num_links * num_nodes // (2 * max(graph.mask.shape)))):
        if count == 0:
            continue
        index = torch.arange(node) + node * (node - 1) // 2
        older = choose(degree[:node], count, 1.0, graph.keys, "grow", index)
        degree[older] += 1
        degree[node] += count
        within = is_output[older] == is_output[node]
        stubs[older[within]] += 1
        stubs[node] += int(within.sum())
        across = neuron[older[~within]]
        if is_output[node]:
            graph.mask[neuron[node], across - num_outputs] = True
        else:
            graph.mask[across, neuron[node] - num_outputs] = True
    by_neuron = torch.empty_like(stubs)
    by_neuron[neuron] = stubs
    return by_neuron[:num_outputs], by_neuron[num_outputs:]


def _new_links(num_nodes: int, num_links: int) -> list[int]:
    """How many links each node of a growing graph brings: m of them, where so many older ones exist.

    A mean that is no whole number is a mixture of m and m + 1, evenly spread over the nodes.
    """
    m = 0
    while m + 1 < num_nodes and (m + 1) * num_nodes - (m + 1) * (m + 2) // 2 <= num_links:
        m += 1
    extra = num_links - (m * num_nodes - m * (m + 1) // 2)
    span = max(1, num_nodes - 1 - m)  # nodes with more than m older ones
    return [
        min(t, m) + ((t - m) * extra // span - (t - m - 1) * extra // span if t > m else 0) for t in range(num_nodes)
    ]


def _join(graph: _Graph, stub_O: Tensor, stub_I: Tensor) -> None:
    """Join stubs of the two sides; what is left in ``stub_O`` and ``stub_I`` found no partner.

    The neurons of the side with fewer stubs draw, those with most of them first: hubs find enough partners then.
    """
    side, own, other = (0, stub_O, stub_I) if stub_O.sum() <= stub_I.sum() else (1, stub_I, stub_O)
    for neuron in own.argsort(descending=True, stable=True).tolist():
        row = graph.mask.select(side, neuron)
        count = min(int(own[neuron]), int(((other > 0) & ~row).count_nonzero()))
        if count:
            other[graph.link(neuron, side, count, other.float(), "join")] -= 1
            own[neuron] -= count


def _attach_stubs(graph: _Graph, stub_O: Tensor, stub_I: Tensor, num_links: int) -> None:
    """Join stubs that are left to neurons of the other side, in proportion to their degree; at most ``num_links``."""
    side, stubs = (0, stub_O) if stub_O.sum() >= stub_I.sum() else (1, stub_I)
    missing, total = num_links - int(graph.mask.count_nonzero()), int(stubs.sum())
    if missing < total:  # too many by the chance of who is on which side: all neurons give up the same share
        share = stubs * missing
        stubs = share // total
        order = top_k(share % total, missing - int(stubs.sum()), graph.keys, "share")
        stubs[order] += 1
    degree = graph.degrees(1 - side)
    for neuron in stubs.nonzero().squeeze(1).tolist():
        degree[graph.link(neuron, side, int(stubs[neuron]), degree.float(), "attach")] += 1


def _fill(graph: _Graph, num_links: int) -> None:
    """Add the links still missing between neurons of both sides drawn in proportion to their degree."""
    num_outputs, num_inputs = graph.mask.shape
    drawn = 0
    while missing := num_links - int(graph.mask.count_nonzero()):
        degree_O, degree_I = graph.degrees(0), graph.degrees(1)
        weight_O = torch.where(degree_O < num_inputs, degree_O.clamp(min=1), 0)
        bounds = weight_O.cumsum(dim=0)
        share = graph.keys.below("fill row", torch.arange(drawn, drawn + missing), int(bounds[-1]))
        rows = torch.searchsorted(bounds, share, right=True)
        drawn += missing
        for neuron, count in enumerate(torch.bincount(rows, minlength=num_outputs).tolist()):
            if count:
                degree_I[graph.link(neuron, 0, count, degree_I.float(), "fill")] += 1


def _level_inputs(mask_OI: Tensor, keys: Keys) -> Tensor:
    """A mask with the same output degrees whose input degrees differ by at most one."""
    mask = torch.zeros_like(mask_OI)
    degree_I = torch.zeros(mask.shape[1])
    column = torch.arange(mask.shape[1])
    for row, degree in enumerate(mask_OI.sum(dim=1).tolist()):
        chosen = top_k(-degree_I, degree, keys, "level", row * len(column) + column)
        mask[row, chosen] = True
        degree_I[chosen] += 1
    return mask
