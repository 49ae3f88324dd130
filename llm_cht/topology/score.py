"""Removal scores: how much an existing link is worth; the lowest are removed.

One signature, so that a method names its score as data: ``(weight_OI, mask_OI, gradient_OI or None) -> score_OI``.
The weights are the fp32 masters, exactly 0 off the mask; scores are fp32 and mean something on existing links only.
"""

from collections.abc import Callable

from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]

EPSILON = 1e-5  # added to the sums of relative importance


def magnitude(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None) -> Tensor:
    """Return abs(weight), shape (out, in)."""
    return weight_OI.detach().float().abs()


def relative_importance(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None) -> Tensor:
    """Return abs(weight) over the sum of its row plus the same over the sum of its column (paper 002, RI).

    Sums over whole rows and columns are sums over the existing links, because the other weights are 0.
    """
    size_OI = magnitude(weight_OI, mask_OI, gradient_OI)
    row_O1 = size_OI.sum(dim=1, keepdim=True).add_(EPSILON)
    column_1I = size_OI.sum(dim=0, keepdim=True).add_(EPSILON)
    return size_OI / row_O1 + size_OI / column_1I


SCORES: dict[str, Score] = {"magnitude": magnitude, "relative_importance": relative_importance}
