"""Link predictors that weigh every path of length three by both of its inner nodes: CH3-L3p and CH2-L3p.

No path is stored, and no graph library is needed. Ordered by the inner node z on one side (the inputs, unless the
layer has more outputs than inputs, when it is transposed), the score is a sum over z of

    S[N(z), :] += Q[z, :] * (P[N(z), N(z)] @ A[N(z), :])

with N(z) the neighbours of z, P[u, z1] = (d_z1 - UU[u, z1])**-1/2, Q[z, v] = (d_z - VV[z, v])**-1/2, both 0 where the
difference is 0, and UU, VV the numbers of common neighbours on the two sides. The nodes z go in batches, sorted by
degree and padded with a node without links. UU is counted once, (out, out) and no larger than the layer; of VV only the
rows of the batch ever exist. Counts in fp32 are exact.

Two ways to add a batch. Products, as written: 2 (m n d)**2 FLOP for a layer m x n of density d. Paths: one scattered
addition for each of the about (m n)**2 d**3 paths, which go to few rows at a time. Time of the products over that of
the paths, *measured* on one core of an AMD EPYC (torch 2.13): at 1 % 2.1 (784 x 1568), 1.4 (1568 x 1568) and 1.4
(2048 x 5461), at 2 % 1.2, 0.8 and 1.0, at 5 % 0.35 (1568 x 1568); so paths are added one by one below ``PATHS_BELOW``.
Rejected: a loop over the links that adds an outer product for each (6 to 9 times slower in numpy, 1 %, the first two
layers), and numba, which that does not need.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llm_cht.topology.node_rules import check_room, neighbour_lists, numbers

PATHS_BELOW = 0.02
"""density below which paths are added one by one"""
_CACHE = 1 << 20  # numbers per batch on a CPU


def path_scores(mask_OI: Tensor, workspace_mb: int, rule: str, on_links: bool = False) -> Tensor:
    """Return the scores (out, in) of CH3-L3p (``rule`` "ch3"; papers 000 eq. 2 and 002 eq. 5) or CH2-L3p ("ch2").

    A path u - z2 - z1 - v adds 1 / sqrt((1 + de_z1) (1 + de_z2)), with de the links of a node that go neither to the
    far end of the path nor to a neighbour of it; CH2 multiplies by sqrt((1 + UU[u, z1]) (1 + VV[v, z2])).

    ``on_links``: score the existing links instead, each as if it alone were missing; the missing ones get 0.

    Memory: the result, the lists of links, the fp32 links (products only), the common neighbours on the smaller side,
    and temporaries below ``workspace_mb`` MiB; a ``UserError`` says so if the node with the most links does not fit. On
    a GPU the additions come in any order, so that scores may differ from run to run by rounding.
    """
    if mask_OI.shape[0] > mask_OI.shape[1]:
        return path_scores(mask_OI.T.contiguous(), workspace_mb, rule, on_links).T.contiguous()
    out, inputs = mask_OI.shape
    paths = _Paths(mask_OI, _Rule(rule, on_links))
    score_OI = mask_OI.new_zeros(out + 1, inputs, dtype=torch.float32)  # the last row takes what the padding adds
    products = len(paths.neighbours_I) >= PATHS_BELOW * mask_OI.numel()
    size_I = paths.size_of_products() if products else paths.size_of_paths()
    room = numbers(workspace_mb)
    check_room(int(size_I.max()) <= room, workspace_mb, out + inputs)
    piece = room if mask_OI.is_cuda else min(room, _CACHE)
    batches = list(paths.batches(size_I, piece))
    for batch in batches:
        paths.count(batch)
    links_OI = torch.zeros_like(score_OI) if products else None
    if links_OI is not None:
        links_OI[:out] = mask_OI
    for batch in batches:
        if links_OI is not None:
            paths.add_products(batch, links_OI, score_OI)
        else:
            paths.add_paths(batch, piece, score_OI)
    return score_OI[:out].masked_fill_(~mask_OI if on_links else mask_OI, 0)


@dataclass(frozen=True)
class _Rule:
    """Which weights; ``on_links``: of the graph in which the link that is scored were missing."""

    name: str
    on_links: bool

    def weigh_(self, common: Tensor, degree: Tensor) -> Tensor:
        """P or Q of inner nodes with ``degree`` links, ``common`` of them to the far end's neighbours; changes it."""
        if self.on_links:
            common.sub_(1)  # without the link its far end is shared no more
        weight = torch.threshold_(degree - common, 0, torch.inf).rsqrt_()
        return weight.mul_(common.add_(1).sqrt_()) if self.name == "ch2" else weight


class _Paths:
    """The lists of links of a layer, and the paths through batches of its inputs.

    A batch is a row of inputs, sorted by degree. Their neighbours stand in a table, filled up with one more output,
    number ``out``, that has no link.
    """

    def __init__(self, mask_OI: Tensor, rule: _Rule) -> None:
        self.rule = rule
        self.out, self.inputs = mask_OI.shape
        self.neighbours_I, self.start_I, self.degree_I = neighbour_lists(mask_OI.T)
        self.neighbours_O, *rest = neighbour_lists(mask_OI)
        self.start_O, self.degree_O = (torch.cat([each, each.new_zeros(1)]) for each in rest)
        self.common_OO = mask_OI.new_zeros(self.out + 1, self.out + 1, dtype=torch.float32)
        """numbers of common neighbours of two outputs, once every batch was counted"""

    def size_of_products(self) -> Tensor:
        """Numbers that each input takes in ``add_products``."""
        return 2 * self.degree_I * self.inputs + 7 * self.degree_I**2 + 4 * self.inputs

    def size_of_paths(self) -> Tensor:
        """Numbers that each input takes in ``add_paths``, but for the paths themselves, which go in pieces."""
        owner = torch.repeat_interleave(self.degree_I)
        steps = torch.zeros_like(self.degree_I).scatter_add_(0, owner, self.degree_O[self.neighbours_I])
        return 7 * self.degree_I**2 + 2 * self.inputs + 16 * steps

    def batches(self, size_I: Tensor, room: int) -> Iterator[Tensor]:
        """Inputs on paths, the most linked first, as many at a time as fit when each takes what the largest does."""
        degree_I, order_I = self.degree_I.sort(descending=True, stable=True)
        order_I = order_I[degree_I > 1]
        start = largest = 0
        for end, size in enumerate(size_I[order_I].tolist()):
            largest = max(largest, size)
            if (end + 1 - start) * largest > room and end > start:
                yield order_I[start:end]
                start, largest = end, size
        if len(order_I):
            yield order_I[start:]

    def count(self, input_B: Tensor) -> None:
        """Count the neighbours that pairs of outputs have in common in the batch."""
        pair = self._pairs(self._neighbours(input_B)).view(-1)
        self.common_OO.view(-1).scatter_add_(0, pair, self.common_OO.new_ones(1).expand(len(pair)))

    def add_products(self, input_B: Tensor, links_OI: Tensor, score_OI: Tensor) -> None:
        """Add the paths through the batch as products; ``links_OI`` and ``score_OI`` have the padding row."""
        neighbours_BD = self._neighbours(input_B)
        p_BDD = self._p(neighbours_BD)
        common_BI = embedding_bag(neighbours_BD, links_OI, mode="sum")
        q_BI = self.rule.weigh_(common_BI, self.degree_I[input_B, None].float())
        q_BI.scatter_(1, input_B[:, None], 0)
        links_BDI = links_OI.index_select(0, neighbours_BD.view(-1)).view(*neighbours_BD.shape, self.inputs)
        paths_BDI = torch.bmm(p_BDD.transpose(1, 2), links_BDI).mul_(q_BI[:, None])
        score_OI.index_add_(0, neighbours_BD.view(-1), paths_BDI.view(-1, self.inputs))

    def add_paths(self, input_B: Tensor, room: int, score_OI: Tensor) -> None:
        """Add the paths through the batch one by one: all steps from a neighbour, times all neighbours."""
        neighbours_BD = self._neighbours(input_B)
        depth = neighbours_BD.shape[1]
        p_LD = self._p(neighbours_BD).view(-1, depth)
        rows_BD = neighbours_BD * self.inputs
        link_S, far_S = self._steps(neighbours_BD.view(-1))
        batch_S = link_S // depth
        slot_S = batch_S * self.inputs + far_S
        common = p_LD.new_zeros(len(input_B) * self.inputs)
        common.scatter_add_(0, slot_S, common.new_ones(1).expand(len(slot_S)))
        near_S = input_B.index_select(0, batch_S)
        q_S = self.rule.weigh_(common.index_select(0, slot_S), self.degree_I.index_select(0, near_S).float())
        q_S.masked_fill_(near_S == far_S, 0)
        pieces = (each.split(max(1, room // (8 * depth))) for each in (link_S, far_S, batch_S, q_S))
        for link, far, batch, q in zip(*pieces, strict=True):
            paths = p_LD.index_select(0, link).mul_(q[:, None])
            place = rows_BD.index_select(0, batch).add_(far[:, None])
            score_OI.view(-1).scatter_add_(0, place.view(-1), paths.view(-1))

    def _neighbours(self, input_B: Tensor) -> Tensor:
        degree_B1 = self.degree_I[input_B, None]
        place_D = torch.arange(int(degree_B1[0]), device=input_B.device)
        place_BD = (self.start_I[input_B, None] + place_D).clamp_(max=len(self.neighbours_I) - 1)
        return torch.where(place_D < degree_B1, self.neighbours_I[place_BD], self.out)

    def _pairs(self, neighbours_BD: Tensor) -> Tensor:
        return (neighbours_BD * (self.out + 1))[:, :, None] + neighbours_BD[:, None]

    def _p(self, neighbours_BD: Tensor) -> Tensor:
        """P[u, z1] of all pairs of neighbours, at [z1, u]."""
        pair = self._pairs(neighbours_BD)
        common = self.common_OO.view(-1).index_select(0, pair.view(-1)).view(pair.shape)
        p_BDD = self.rule.weigh_(common, self.degree_O[neighbours_BD][:, :, None].float())
        p_BDD.diagonal(dim1=1, dim2=2).zero_()
        return p_BDD

    def _steps(self, node_L: Tensor) -> tuple[Tensor, Tensor]:
        """Every link of the outputs ``node_L``: whose it is (a place in ``node_L``), and the input it leads to."""
        degree_L = self.degree_O.index_select(0, node_L)
        link_S = torch.repeat_interleave(degree_L)
        first_L = self.start_O.index_select(0, node_L) - (degree_L.cumsum(0) - degree_L)
        place_S = first_L.index_select(0, link_S).add_(torch.arange(len(link_S), device=link_S.device))
        return link_S, self.neighbours_O.index_select(0, place_S)
