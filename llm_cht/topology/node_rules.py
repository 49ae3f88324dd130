"""Link predictors that add one node term per path of length three: CH2-L3n, CH3-L3n, CN-L3.

Path by path, as published, these are out of reach at 10 % density; as matrices each is one or two pairs of products:
the common neighbours of all nodes of a side, turned into weights, times the links. The products go in blocks, so that
the square matrices of common neighbours (462 MiB for the inputs of a 4096 x 11008 layer) never exist whole; the
elementwise work between two products runs in place, on pieces that stay in the cache.

There are two ways to multiply by 0/1 links. Dense: fp32 products, 4 m n (m + n) FLOP for a CH rule whatever the
density. Sparse: for every node the sum of the rows it is linked to (``embedding_bag``, which needs no MKL), as many
additions as there are links, times the columns. CH2-L3n, dense time over sparse time, *measured* on one core of an AMD
EPYC with AVX-512 (torch 2.13):

===========  =====  =====  =====  =====  =====
layer          1 %    5 %   10 %   20 %   40 %
===========  =====  =====  =====  =====  =====
512 x 1376     6.1    3.9    2.6    1.6    0.9
1568 x 1568    8.5    4.4    2.9    1.8    1.0
2048 x 5461   12.9    6.0    3.7    2.1    1.2
===========  =====  =====  =====  =====  =====

so the sparse way is taken below ``SPARSE_BELOW``; on a GPU, where nothing was measured, never. Rejected: torch's own
sparse matrices (CSR twice as slow and only with MKL; COO four to twenty times) and the enumeration of paths, one
scattered addition each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llm_cht.errors import UserError

SPARSE_BELOW = 0.2
"""density below which the sparse way is taken on a CPU; there its lists of links are no larger than fp32 links"""
_PIECE = 1 << 18  # numbers per elementwise piece, or about per block of the sparse way


@dataclass(frozen=True)
class _Rule:
    """Which weights; ``on_links``: of the graph in which the link that is scored were missing."""

    name: str
    on_links: bool

    def weigh_(self, common: Tensor, degree: Tensor, diagonal: int) -> None:
        """Turn numbers of common neighbours into the weights e, in place; ``degree`` broadcasts to ``common``."""
        if self.name == "cn":
            return
        if self.on_links:
            common.sub_(1)  # without the link its far end is shared no more
        # Neighbours of j that are not i's: where there are none the weight becomes 0, as where nothing is shared.
        others = torch.threshold_(degree - common, 0, torch.inf)
        if self.name == "ch2":
            torch.threshold_(common.add_(1), 1, 0)
        else:
            common.clamp_(0, 1)
        common.div_(others)
        if self.on_links:
            common.diagonal(diagonal).zero_()


def node_scores(mask_OI: Tensor, workspace_mb: int, rule: str, on_links: bool = False) -> Tensor:
    """Return the scores (out, in) of CH2-L3n (``rule`` "ch2"; paper 002, Algorithm 1), CH3-L3n ("ch3") or CN-L3 ("cn").

    With UU = A A^T, VV = A^T A and d the degrees: e_U[i, j] = (UU[i, j] + 1) / (d_j - UU[i, j]) where UU[i, j] > 0,
    else 0 (CH3: numerator 1), e_V alike from VV; the score is e_U A + (e_V A^T)^T. Where the denominator is 0 (every
    neighbour of j is one of i's, so that j lies on no path to a missing link of i; the diagonal is such a case) e is 0.
    CN-L3 (paper 000, section 3.1) is UU A, the number of paths.

    ``on_links`` (CH rules only): score the existing links instead, each as if it alone were missing; the others get 0.

    Temporaries beyond the result, and as much again for the links in fp32 or in lists, stay below ``workspace_mb`` MiB;
    a ``UserError`` says so if not even one row fits.
    """
    score_OI = torch.zeros_like(mask_OI, dtype=torch.float32, memory_format=torch.contiguous_format)
    sides = [(mask_OI, score_OI), (mask_OI.T, score_OI.T)][: 1 if rule == "cn" else 2]
    if not mask_OI.is_cuda and int(mask_OI.count_nonzero()) < SPARSE_BELOW * mask_OI.numel():
        for links_UV, out_UV in sides:
            _add_sparse(links_UV, workspace_mb, _Rule(rule, on_links), out_UV)
    else:
        adjacency_OI = mask_OI.float()
        for links_UV, (_, out_UV) in zip((adjacency_OI, adjacency_OI.T), sides, strict=False):
            _add_dense(links_UV, workspace_mb, _Rule(rule, on_links), out_UV)
    return score_OI.masked_fill_(~mask_OI if on_links else mask_OI, 0)


def numbers(workspace_mb: int) -> int:
    """How many fp32 numbers a workspace holds; an eighth is left to buffers inside BLAS."""
    return workspace_mb * 2**20 // 4 * 7 // 8


def check_room(fits: bool, workspace_mb: int, num_nodes: int) -> None:
    """Refuse a workspace that does not hold the least piece of work."""
    if not fits:
        raise UserError(
            f"`method.workspace_mb` = {workspace_mb}: too small for a layer with {num_nodes} neurons; raise it"
        )


def neighbour_lists(links_UV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the neighbours of all nodes of U, one node after the other, where each starts, and how many; int64."""
    num_nodes, num_neighbours = links_UV.shape
    place = links_UV.reshape(-1).nonzero().squeeze(1)
    row_ends = torch.arange(num_nodes + 1, device=place.device) * num_neighbours
    start = torch.searchsorted(place, row_ends)  # a sum of booleans would take eight bytes a position
    return place.remainder_(num_neighbours), start[:-1], start.diff()


def _add_dense(links_UV: Tensor, workspace_mb: int, rule: _Rule, out_UV: Tensor) -> None:
    """Add e_U @ links_UV (fp32) to ``out_UV``, in blocks of rows."""
    num_nodes, room = links_UV.shape[0], numbers(workspace_mb)
    piece_rows = max(1, min(_PIECE, room // 2) // num_nodes)
    rows = min(num_nodes, room // num_nodes - piece_rows)
    check_room(rows >= 1, workspace_mb, num_nodes)
    degree_U = links_UV.sum(dim=1)
    common = links_UV.new_empty(rows, num_nodes)
    for block in _blocks(num_nodes, rows):
        common_BU = torch.mm(links_UV[block], links_UV.T, out=common[: block.stop - block.start])
        for start, piece in enumerate(common_BU.split(piece_rows)):
            rule.weigh_(piece, degree_U, block.start + start * piece_rows)
        out_UV[block].addmm_(common_BU, links_UV)


def _add_sparse(links_UV: Tensor, workspace_mb: int, rule: _Rule, out_UV: Tensor) -> None:
    """Add e_U @ links_UV (bool) to ``out_UV``, in blocks of rows; inside, rows are columns."""
    num_nodes = sum(links_UV.shape)
    columns = min(max(64, min(256, _PIECE // num_nodes)), numbers(workspace_mb) // (2 * num_nodes))
    check_room(columns >= 1, workspace_mb, num_nodes)
    neighbours_U, start_U, degree_U = (each.int() for each in neighbour_lists(links_UV))
    neighbours_V, start_V, _ = (each.int() for each in neighbour_lists(links_UV.T))
    for block in _blocks(len(links_UV), columns):
        common_UB = _sums(neighbours_U, start_U, links_UV[block].T.contiguous().float())
        rule.weigh_(common_UB, degree_U[:, None].float(), -block.start)
        out_UV[block] += _sums(neighbours_V, start_V, common_UB).T


def _blocks(num_rows: int, rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _sums(neighbours: Tensor, start_U: Tensor, rows_VB: Tensor) -> Tensor:
    """The sum of the rows of the neighbours of every node, (U, B)."""
    return embedding_bag(neighbours, rows_VB, start_U, mode="sum")
