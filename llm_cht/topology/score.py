"""Removal scores: how much an existing link is worth; the lowest are removed. And the check of any rule's score.

One signature, so that a method names its score as data: ``(weight_OI, mask_OI, gradient_OI or None) -> score_OI``.
The weights are the fp32 masters, exactly 0 off the mask; scores are fp32 and mean something on existing links only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_cht.errors import UserError

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
