"""Sentence pairs for translation: settings, preparation and access."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llm_cht.data.pair_batches import HeldOut, PairTokens, TokenBatches
from llm_cht.data.pair_settings import PairSettings

__all__ = ["HeldOut", "PairCounts", "PairData", "PairSettings", "PairTokens", "TokenBatches"]


@dataclass
class PairCounts:
    """What became of the pairs of one split."""

    read: int = 0
    kept: int = 0
    dropped_empty: int = 0
    """a side without text"""
    dropped_long: int = 0
    """a side above `pairs.max_length`"""
    dropped_ratio: int = 0
    """sides whose lengths differ by more than `pairs.max_ratio`"""
    dropped_shared: int = 0
    """also in validation or test"""
    source_tokens: int = 0
    """of the kept pairs, end tokens included"""
    target_tokens: int = 0


@dataclass(frozen=True)
class PairData:
    """Sentence pairs ready for training."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenBatches
    validation: HeldOut
    test: HeldOut | None
    fingerprint: str
    """of the documents and all that decides tokens and batches; a resume compares it"""
    sizes: tuple[int, int]
    """embeddings needed for source and target: largest token number + 1"""
    longest: int
    """tokens of the longest side of any kept pair of any split, end token included"""
    counts: dict[str, PairCounts]
    """of `train`, `validation` and `test`"""
    cache: Path


def check(settings: PairSettings) -> None:
    """Refuse values that cannot work, without looking at any file.

    Raises:
        UserError: names the setting and the remedy.
    """
    raise NotImplementedError


def with_absolute_paths(settings: PairSettings) -> PairSettings:
    """``settings`` whose names of local files mean the same from any working directory."""
    raise NotImplementedError


def load_pairs(
    settings: PairSettings, batch_tokens: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PairData:
    """Prepare the pairs of ``settings``, or open them if the cache has them; ``seed`` draws the order of training."""
    raise NotImplementedError


def describe(data: PairData) -> str:
    """What was prepared, for a person."""
    raise NotImplementedError
