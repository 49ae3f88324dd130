"""Settings of sentence pairs. A module of its own, light to import, so that `--help` need not load transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PairSettings:
    """Where the sentence pairs come from and how they become tokens."""

    source: str = "en"
    """language translated from: suffix of aligned files, field of records"""
    target: str = "de"
    """language translated into"""
    train: str | list[str] | None = None
    """needed for translation: the prefix of two aligned files (PREFIX.en, PREFIX.de, also with `.gz` or `.xz`), a list
    of two such files, one file of records (`.tsv`, `.jsonl`, `.zip`), or the name of a data set of the hub"""
    subset: str | None = None
    """configuration of a hub data set"""
    split: str = "train"
    """split of a hub data set"""
    validation: str | list[str] | None = None
    """pairs to validate on, named as in `train` (for a hub source: one of its splits); null: hold pairs out"""
    validation_fraction: float = 0.01
    """pairs held out, by a hash of their source sentence"""
    test: str | list[str] | None = None
    """pairs to test on at the end, named as in `train` (for a hub source: one of its splits); null: none"""
    vocabulary: str = "bpe"
    """`bpe`, `unigram` or `word`, trained on the training pairs, or a folder or hub name of a tokenizer"""
    joint: bool = True
    """one trained vocabulary for both languages; false: one each"""
    vocab_size: int = 8000
    """tokens of each trained vocabulary, at most"""
    lowercase: bool = False
    """the trained vocabulary folds case"""
    max_length: int = 128
    """tokens of a side, its end token included; longer training pairs are dropped"""
    max_ratio: float | None = None
    """tokens of the longer side over those of the shorter, end tokens left out; training pairs beyond are dropped"""
    cache_dir: str | None = None
    """prepared data; null: $LLM_CHT_CACHE, else `llm_cht` in the user's cache folder"""
