"""Link predictors: how likely a missing link is to be grown, from the topology alone or from the dense gradient.

One signature, so that a method names its predictor as data: ``(mask_OI, gradient_OI, workspace_mb) -> score_OI``, fp32,
at least 0 and exactly 0 on existing links. The gradient, that of the dense weight, is None unless ``NEEDS_GRADIENT``
has the predictor.

A layer is a bipartite graph. CH2-L3n adds, over all paths of length three from an output to an input, one node term per
path, which makes it four dense matrix products; path by path, as published, it is out of reach at 10 % density. The
products go in blocks of rows, so that the square matrices of common neighbours (462 MiB for the inputs of a
4096 x 11008 layer) never exist whole; the elementwise work between two products runs in place, on pieces that stay in
the cache. Sparse products were rejected: they win only below about 2 % density.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llm_cht.errors import UserError

Predictor = Callable[[Tensor, Tensor | None, int], Tensor]

_PIECE = 1 << 18  # numbers per elementwise piece


def random(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return 1 on every missing link (SET): all are equally likely."""
    return (~mask_OI).float()


def gradient(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the size of the loss's gradient by the missing link (RigL), averaged over ranks and micro-batches."""
    assert gradient_OI is not None, "the updater captures the gradient for predictors in NEEDS_GRADIENT"
    return gradient_OI.abs().masked_fill_(mask_OI, 0)


def ch2_l3n(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the CH2-L3n scores (paper 002, Algorithm 1), shape (out, in).

    With UU = A A^T, VV = A^T A and d the degrees: e_U[i, j] = (UU[i, j] + 1) / (d_j - UU[i, j]) where UU[i, j] > 0,
    else 0, e_V alike from VV; the score is e_U A + (e_V A^T)^T. Where the denominator is 0 (every neighbour of j is one
    of i's, so that j lies on no path to a missing link of i; the diagonal is such a case) e is 0.

    Temporaries beyond the fp32 adjacency and the result stay below ``workspace_mb`` MiB; a ``UserError`` says so if not
    even one row fits.
    """
    adjacency_OI = mask_OI.float()
    score_OI = torch.empty_like(adjacency_OI)
    _node_paths(adjacency_OI, workspace_mb, out=score_OI, beta=0)
    _node_paths(adjacency_OI.T, workspace_mb, out=score_OI.T, beta=1)
    return score_OI.masked_fill_(mask_OI, 0)


def _node_paths(links_UV: Tensor, workspace_mb: int, out: Tensor, beta: int) -> None:
    """Put beta * out + e_U @ links_UV into ``out`` (U, V), in blocks of rows."""
    num_nodes = links_UV.shape[0]
    room = workspace_mb * 2**20 // 4 * 7 // 8  # numbers; an eighth is left to buffers inside BLAS
    piece_rows = max(1, min(_PIECE, room // 2) // num_nodes)
    rows = min(num_nodes, room // num_nodes - piece_rows)
    if rows < 1:
        raise UserError(
            f"`method.workspace_mb` = {workspace_mb}: too small for a layer with {num_nodes} neurons; raise it"
        )
    degree_U = links_UV.sum(dim=1)
    common = links_UV.new_empty(rows, num_nodes)
    for start in range(0, num_nodes, rows):
        block = slice(start, min(start + rows, num_nodes))
        common_BU = torch.mm(links_UV[block], links_UV.T, out=common[: block.stop - start])
        for piece in common_BU.split(piece_rows):
            _common_to_weight_(piece, degree_U)
        out[block].addmm_(common_BU, links_UV, beta=beta)


def _common_to_weight_(common_BU: Tensor, degree_U: Tensor) -> None:
    """Turn numbers of common neighbours into the weights e, in place."""
    # Neighbours of j that are not i's: where there are none the weight becomes 0, as where nothing is shared.
    others_BU = torch.threshold_(degree_U - common_BU, 0, torch.inf)
    torch.threshold_(common_BU.add_(1), 1, 0).div_(others_BU)


PREDICTORS: dict[str, Predictor] = {"random": random, "gradient": gradient, "ch2_l3n": ch2_l3n}
NEEDS_GRADIENT = frozenset({"gradient"})
NEEDS_MOMENTUM = frozenset({"momentum"})
PATHS = frozenset({"cn_l3", "ch2_l3n", "ch3_l3n", "ch2_l3p", "ch3_l3p"})
"""rules on paths of length three, whose ties sub-ranking can break"""


def cost(predictor: str, shape: tuple[int, int]) -> float:
    """Work of an update that regrows by ``predictor`` in a layer of ``shape``, in FLOP; choosing counts 100 a position.

    Node rules: the four products, 4 m n (m + n).
    """
    out, inputs = shape
    products = 4.0 * out * inputs * (out + inputs) if predictor == "ch2_l3n" else 0.0
    return products + 100.0 * out * inputs
