"""Settings of the data. A module of its own, light to import, so that `--help` need not load transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataSettings:
    """Where the text comes from and how it becomes sequences."""

    source: str | list[str] = "builtin"
    """`builtin` (the Python standard library), files, folders or globs, or the name of a data set of the hub"""
    subset: str | None = None
    """configuration of a hub data set"""
    split: str = "train"
    """split of a hub data set"""
    text_field: str = "text"
    """field of JSON lines, parquet and hub data sets that holds the text"""
    text_documents: Literal["paragraph", "line", "file", "article"] | None = None
    """one document of a text file: lines up to a blank one, a line, the file, or from a ` = Title = ` line to the next
    (WikiText); null: `article` for `.tokens`, else `paragraph`"""
    validation: str | list[str] | None = None
    """files, folders or globs to validate on (for a hub source: one of its splits); null: hold documents out"""
    validation_fraction: float = 0.01
    """documents held out, by a hash of their text"""
    streaming: bool = False
    """read and tokenize while training instead of before it"""
    stream_head: int = 20_000
    """with streaming: first documents, which train the tokenizer and hold the validation documents"""
    tokenizer: str | None = None
    """`bpe` (byte-level, trained on the training documents), a Hugging Face name or folder, or a `.model` file; null:
    that of `model.path`, or bpe where there is none"""
    vocab_size: int = 8192
    """of the trained tokenizer"""
    tokenizer_bytes: int = 100_000_000
    """text that trains the tokenizer, at most"""
    sequence_length: int = 256
    """tokens"""
    packing: Literal["pack", "pad"] = "pack"
    """`pack`: documents joined and cut into full sequences; `pad`: one document a sequence, cut and padded"""
    cache_dir: str | None = None
    """prepared data; null: $LLM_CHT_CACHE, else `llm_cht` in the user's cache folder"""
