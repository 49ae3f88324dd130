"""Removal scores: how much an existing link is worth; the lowest are removed. And the check of any rule's score.

One signature, so that a method names its score as data: ``(weight_OI, mask_OI, gradient_OI, alpha) -> score_OI``. The
weights are the fp32 masters, exactly 0 off the mask; the gradient, that of the dense weight, is None unless
``NEEDS_GRADIENT`` has the score; alpha is ``method.removal_alpha``. Scores are fp32 and mean something on existing
links only. SET's rule of two signs is a score too (ranks within each sign), so that selection knows no rule by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_cht.errors import UserError

Score = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]

EPSILON = 1e-5  # added to the sums of relative importance and to what divides a sensitivity
_MEST_GRADIENT = 0.01


def magnitude(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return abs(weight), shape (out, in)."""
    return weight_OI.detach().float().abs()


def relative_importance(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return abs(weight) over the sum of its row plus the same over the sum of its column (paper 002, RI).

    Sums over whole rows and columns are sums over the existing links, because the other weights are 0.
    """
    size_OI = magnitude(weight_OI, mask_OI, gradient_OI, alpha)
    row_O1 = size_OI.sum(dim=1, keepdim=True).add_(EPSILON)
    column_1I = size_OI.sum(dim=0, keepdim=True).add_(EPSILON)
    return size_OI / row_O1 + size_OI / column_1I


def general(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return the score between magnitude (alpha 1) and half the relative importance (alpha 0) (002 eq. 2).

    abs(w) / 2 / (alpha + (1 - alpha) row sum), plus the same over the column sum.
    """
    size_OI = magnitude(weight_OI, mask_OI, gradient_OI, alpha)
    row_O1 = size_OI.sum(dim=1, keepdim=True).add_(EPSILON).mul_(1 - alpha).add_(alpha)
    column_1I = size_OI.sum(dim=0, keepdim=True).add_(EPSILON).mul_(1 - alpha).add_(alpha)
    return size_OI.div(2).div_(row_O1) + size_OI.div(2).div_(column_1I)


def mest(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return abs(weight) + 0.01 abs(gradient)."""
    return magnitude(weight_OI, mask_OI, gradient_OI, alpha) + _MEST_GRADIENT * _slope(gradient_OI)


def snip(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return abs(weight * gradient): the loss that the link's removal costs, to first order (002 Table 12)."""
    return magnitude(weight_OI, mask_OI, gradient_OI, alpha) * _slope(gradient_OI)


def sensitivity(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return abs(gradient) / (abs(weight) + eps) (002 Table 12)."""
    return _slope(gradient_OI) / (magnitude(weight_OI, mask_OI, gradient_OI, alpha) + EPSILON)


def reciprocal_sensitivity(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return abs(weight) / (abs(gradient) + eps) (002 Table 12)."""
    return magnitude(weight_OI, mask_OI, gradient_OI, alpha) / (_slope(gradient_OI) + EPSILON)


def two_sided(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return the rank by size among the links of the same sign, as a share of them in (0, 1]; 0 for zero weights (003).

    The k lowest then are zeros first, and after them the smallest positive and the negative links nearest 0, each in
    proportion to its number.
    """
    weight_OI = weight_OI.detach().float()
    score_OI = torch.zeros_like(weight_OI)
    for same_sign_OI in (weight_OI > 0, weight_OI < 0):
        size = weight_OI[same_sign_OI].abs()
        if size.numel():
            score_OI[same_sign_OI] = (torch.searchsorted(size.sort().values, size) + 0.5) / size.numel()
    return score_OI


def random(weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor | None, alpha: float) -> Tensor:
    """Return 1 on every link: ties are broken at random."""
    return torch.ones_like(weight_OI, dtype=torch.float32)


def _slope(gradient_OI: Tensor | None) -> Tensor:
    assert gradient_OI is not None, "the updater captures the gradient for scores in NEEDS_GRADIENT"
    return gradient_OI.detach().float().abs()


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "relative_importance": relative_importance,
    "general": general,
    "mest": mest,
    "snip": snip,
    "sensitivity": sensitivity,
    "reciprocal_sensitivity": reciprocal_sensitivity,
    "two_sided": two_sided,
    "random": random,
}
NEEDS_GRADIENT = frozenset({"mest", "snip", "sensitivity", "reciprocal_sensitivity"})
HARD_ONLY = frozenset({"two_sided"})
"""ranks, whose powers mean nothing as probabilities"""


@dataclass(frozen=True)
class Scored:
    """What a rule says of a layer; checked, since a rule that breaks its contract would make counts wrong silently."""

    rule: str
    """how messages call it"""
    layer: str
    score_OI: Tensor
    mask_OI: Tensor

    def __post_init__(self) -> None:
        expected, actual = tuple(self.mask_OI.shape), tuple(self.score_OI.shape)
        if actual != expected or not self.score_OI.is_floating_point():
            raise self._broken(f"has shape {actual} and {self.score_OI.dtype}, not {expected} and a float type")

    def check_range(self, scores: Tensor) -> None:
        """Raise ``UserError`` where one of ``scores``, those that count, is negative or not finite."""
        if scores.numel():
            low, high = (bound.item() for bound in torch.aminmax(scores))  # NaN if there is one
            if not (low >= 0 and math.isfinite(high)):
                raise self._broken(f"runs from {low:g} to {high:g}, not from 0 or more to a finite number")

    def check_zero_on_links(self) -> None:
        """Raise ``UserError`` if an existing link has a score, which would grow it again."""
        if scored := int(((self.score_OI != 0) & self.mask_OI).count_nonzero()):
            raise self._broken(f"is not 0 on {scored} existing links")

    def _broken(self, fault: str) -> UserError:
        return UserError(f"{self.rule}: its score of `{self.layer}` {fault}; correct that rule, or choose another")
