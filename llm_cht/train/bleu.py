"""BLEU of translations by sacreBLEU itself, in the two forms that papers report.

``score`` is what is comparable between papers that use sacreBLEU: detokenised text, case kept, its own tokeniser 13a.
``lowercased`` is the same on lower-cased text, the nearest to the "tokenised, lower-cased BLEU" of older papers. Each
comes with the signature that a reader needs to compute it again. Rejected: BLEU of our own, and nltk's, whose
tokenisation and smoothing nobody can tell from a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU

from llm_cht.errors import UserError


@dataclass(frozen=True)
class Bleu:
    """BLEU of a corpus, in per cent."""

    score: float
    """13a tokens, mixed case"""
    signature: str
    """of ``score``, as sacreBLEU writes it"""
    lowercased: float
    """13a tokens, lower-cased"""
    lowercased_signature: str
    length_ratio: float
    """tokens of the hypotheses over tokens of the references"""
    brevity_penalty: float
    """1 where the hypotheses are not shorter than the references"""


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """BLEU of one hypothesis a line against one reference a line.

    Raises:
        UserError: there is no line, or not as many hypotheses as references.
    """
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} hypotheses, {len(references)} references: give one reference a hypothesis")
    if not references:
        raise UserError("BLEU of no lines is not defined: give at least one hypothesis and its reference")
    mixed, lower = BLEU(force=True), BLEU(force=True, lowercase=True)  # force: no log line about tokenised full stops
    found, lowercased = (metric.corpus_score(hypotheses, [references]) for metric in (mixed, lower))
    return Bleu(
        score=found.score,
        signature=f"BLEU|{mixed.get_signature()}",
        lowercased=lowercased.score,
        lowercased_signature=f"BLEU|{lower.get_signature()}",
        length_ratio=found.ratio,
        brevity_penalty=found.bp,
    )


def copy_baseline(sources: Sequence[str], references: Sequence[str]) -> Bleu:
    """BLEU of giving the source back: what names, numbers and punctuation alone are worth.

    Raises:
        UserError: as ``bleu``.
    """
    return bleu(sources, references)
