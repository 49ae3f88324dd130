"""Selection of an exact number of links, hard or sampled, with ties broken by random bits.

Sampling without replacement in proportion to p is taking the k largest of log p plus Gumbel noise, so that both kinds
are one operation. ``torch.multinomial`` was rejected (at most 2**24 categories, underflow of score**exponent), and so
was a bare threshold (it takes too many when scores are equal). Memory is linear in the number of scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llm_cht.topology.keys import Keys

TieBreak = Callable[[Tensor], Tensor]

_LARGE, _SAMPLE = 1 << 17, 1 << 14


def top_k(
    score: Tensor,
    k: int,
    keys: Keys,
    purpose: str,
    index: Tensor | None = None,
    tie_break: TieBreak | None = None,
) -> Tensor:
    """Return the positions (int64, ascending) of exactly the ``k`` largest of a 1-D ``score`` without NaN.

    Equal scores are taken in the order of their random bits at ``index`` (flat index of each score in the layer;
    default: its position), which are computed for those alone. ``tie_break`` gives second scores, without NaN, of the
    flat indices that are tied for the last places; the bits then order those still equal.
    """
    chosen, kth = _at_least_kth(score, k)
    if chosen.numel() == k:
        return chosen
    is_above = score[chosen] > kth
    above, tied = chosen[is_above], chosen[~is_above]
    num_wanted = k - above.numel()
    tied_index = tied if index is None else index[tied]
    if tie_break is not None:
        winners = top_k(tie_break(tied_index), num_wanted, keys, purpose, tied_index)
        return torch.cat([above, tied[winners]]).sort().values
    bits = keys.bits(purpose, tied_index)
    winners = _at_least_kth(bits, num_wanted)[0][:num_wanted]  # [:]: bits may be equal, rarely; lower positions win
    return torch.cat([above, tied[winners]]).sort().values


def choose(
    score: Tensor, k: int, exponent: float | None, keys: Keys, purpose: str, index: Tensor | None = None
) -> Tensor:
    """Return the positions (ascending) of ``k`` links of a 1-D ``score`` >= 0.

    Hard (``exponent`` None): the ``k`` largest. Soft: sampled without replacement, with probability proportional to
    score**exponent, exponent >= 0; a score of 0 is drawn last, in random order.
    """
    if exponent is None:
        return top_k(score, k, keys, purpose, index)
    position = torch.arange(score.numel(), device=score.device) if index is None else index
    alpha = max(exponent, 1e-30)  # 0 * log 0 would be NaN
    noisy = keys.gumbel(purpose, position).add_(score.float().log(), alpha=alpha)
    return top_k(noisy, k, keys, purpose, index)


def choose_missing(
    score_OI: Tensor,
    mask_OI: Tensor,
    k: int,
    exponent: float | None,
    keys: Keys,
    tie_break: TieBreak | None = None,
) -> Tensor:
    """Return the flat indices (ascending) of ``k`` missing links to regrow; ``score_OI`` is 0 on existing links.

    Positive scores come first, hard or soft (see ``choose``). If fewer than ``k`` are positive all of them are taken
    and the others drawn uniformly, first where both neurons have links, then among the rest. ``tie_break`` (see
    ``top_k``) serves the hard choice among positive scores.
    """
    assert tie_break is None or exponent is None, "a sample has no ties to break"
    score = score_OI.reshape(-1)
    num_positive = int(score.count_nonzero())
    if k <= num_positive and tie_break is not None:
        return top_k(score, k, keys, "regrow", tie_break=tie_break)
    if k <= num_positive:
        return choose(score, k, exponent, keys, "regrow")
    positive = score > 0
    empty = (~(mask_OI.reshape(-1) | positive)).nonzero().squeeze(1)
    assert k <= num_positive + empty.numel(), (k, num_positive, empty.numel())
    linked_OI = mask_OI.any(dim=1, keepdim=True) & mask_OI.any(dim=0)
    rank = linked_OI.reshape(-1)[empty].float()
    filled = empty[top_k(rank, k - num_positive, keys, "fill", empty)]
    return torch.cat([positive.nonzero().squeeze(1), filled]).sort().values


def _at_least_kth(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the positions (ascending) of the scores that reach the ``k`` th largest, and its value."""
    assert 0 <= k <= score.numel(), (k, score.numel())
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device), score.new_tensor(0)
    assert not score.max().isnan(), "a score is NaN"
    kth = _kth_largest(score, k)
    return (score >= kth).nonzero().squeeze(1), kth


def _kth_largest(score: Tensor, k: int) -> Tensor:
    """Return the ``k`` th largest value.

    Which of equal scores ``topk`` takes is not defined, so that only its smallest value is of use. A few thousand
    scores tell first which ones cannot be among the ``k``: with 45 M scores that is five times faster.
    """
    num_scores = score.numel()
    if num_scores > _LARGE and 2 * k < num_scores:
        sample = score[:: num_scores // _SAMPLE | 1]  # an odd step meets every column
        share = sample.numel() * k / num_scores
        candidates = score[score >= sample.topk(int(share + 4 * share**0.5) + 8, sorted=False).values.min()]
        if candidates.numel() >= k:
            score = candidates
    return score.topk(k, sorted=False).values.min()
