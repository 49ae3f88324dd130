"""Sub-ranking of missing links whose scores are equal (paper 000, App. N): by how alike their ends lie in the graph.

An existing link is as long as 1 / (1 + its CH score). The second score of a missing link is Spearman's correlation of
the shortest-path lengths from its two neurons to all neurons: higher is nearer.

Two decisions the paper leaves open. The CH score of an existing link is that it would have if it alone were missing
(``link.LINK_SCORES``). A neuron that cannot be reached is farther than any that can, and all such are equally far.

Lengths are minima over sums in fp64 from the source outwards and correlations quotients of integers, so that every
device finds the same. Only the neurons of the tied links are sources, in blocks: they relax all links, side by side,
until nothing changes, about as often as paths have links; that costs links x sources x sweeps. Rejected: blocked
Floyd-Warshall, which costs neurons**3 whatever is tied, and a heap per source (Dijkstra), which torch does not have.
"""

import torch
from torch import Tensor

_NUMBERS = 1 << 24  # fp64 numbers (128 MiB) per block of ranks, and of lengths under relaxation


def subrank(mask_OI: Tensor, link_score_OI: Tensor, positions: Tensor) -> Tensor:
    """Return the second scores (fp64, in [-1, 1]) of the missing links at flat indices ``positions`` (int64).

    ``link_score_OI``: CH scores of the existing links, at least 0; the rest of it is not looked at.
    """
    out, inputs = mask_OI.shape
    graph = _Graph(mask_OI, link_score_OI)
    outputs, output_of = (positions // inputs).unique(return_inverse=True)
    others, other_of = (positions % inputs).unique(return_inverse=True)
    block = max(1, _NUMBERS // (out + inputs))
    result = torch.empty(len(positions), dtype=torch.float64, device=positions.device)
    for first_output in range(0, len(outputs), block):
        ranks_O = graph.ranks(outputs[first_output : first_output + block])
        for first_other in range(0, len(others), block):
            ranks_I = graph.ranks(others[first_other : first_other + block] + out)
            here = (output_of // block == first_output // block) & (other_of // block == first_other // block)
            for pair in here.nonzero().squeeze(1).split(block):
                a, b = ranks_O[output_of[pair] - first_output], ranks_I[other_of[pair] - first_other]
                result[pair] = (a * b).sum(1) / ((a * a).sum(1) * (b * b).sum(1)).sqrt()
    return result


class _Graph:
    """Links of a layer with their lengths; neurons are numbered outputs first."""

    def __init__(self, mask_OI: Tensor, link_score_OI: Tensor) -> None:
        self.out, self.inputs = mask_OI.shape
        length_OI = 1 / (1 + link_score_OI.double())
        self.end_O, self.length_O, self.degree_O = _links(mask_OI, length_OI)
        self.end_I, self.length_I, self.degree_I = _links(mask_OI.T, length_OI.T)

    def ranks(self, sources: Tensor) -> Tensor:
        """Ranks of all neurons by distance from each source, ties averaged, doubled and centred: integers (S, N)."""
        num_nodes = self.out + self.inputs
        ranks = torch.empty(len(sources), num_nodes, dtype=torch.float64, device=sources.device)
        columns = max(1, _NUMBERS // max(2 * len(self.end_O), num_nodes))
        for first in range(0, len(sources), columns):
            distance_SN = self._distances(sources[first : first + columns]).T.contiguous()
            ordered_SN = distance_SN.sort(dim=1).values
            below = torch.searchsorted(ordered_SN, distance_SN)
            up_to = torch.searchsorted(ordered_SN, distance_SN, right=True)
            ranks[first : first + columns] = below + up_to - num_nodes
        return ranks

    def _distances(self, sources: Tensor) -> Tensor:
        distance_NS = self.length_O.new_full((self.out + self.inputs, len(sources)), torch.inf)
        distance_NS[sources, torch.arange(len(sources), device=sources.device)] = 0
        outputs_OS, inputs_IS = distance_NS[: self.out], distance_NS[self.out :]
        while True:
            before = distance_NS.clone()
            outputs_OS.copy_(torch.minimum(outputs_OS, _nearest(self.end_O, self.length_O, self.degree_O, inputs_IS)))
            inputs_IS.copy_(torch.minimum(inputs_IS, _nearest(self.end_I, self.length_I, self.degree_I, outputs_OS)))
            if torch.equal(before, distance_NS):
                return distance_NS


def _links(mask_UV: Tensor, length_UV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Far end and length of the links of all nodes of U, one node after the other, and the nodes' degrees."""
    near, far = mask_UV.nonzero(as_tuple=True)
    return far, length_UV[near, far][:, None], torch.bincount(near, minlength=len(mask_UV))


def _nearest(end: Tensor, length: Tensor, degree_U: Tensor, distance_VS: Tensor) -> Tensor:
    """The least of distance plus length over the links of every node of U; infinite without links."""
    over_link = distance_VS.index_select(0, end).add_(length)
    return torch.segment_reduce(over_link, "min", lengths=degree_U, unsafe=True, initial=torch.inf)
