"""Text for a language model: settings, preparation and access.

``load_text`` reads the documents, splits them, trains or loads the tokenizer, packs, and caches all of it; a second
call with the same content and settings opens the cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm_cht.data import sources
from llm_cht.data.cache import built, cache_root
from llm_cht.data.hub import hub_source, reach
from llm_cht.data.order import Batches
from llm_cht.data.pack import Counts, Packer, Sequences, unigram_perplexity
from llm_cht.data.settings import DataSettings
from llm_cht.data.split import Side, Split
from llm_cht.data.stream import Packed, Stream, no_sequence
from llm_cht.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_digest, train_bpe, trained_bpe
from llm_cht.errors import UserError

__all__ = ["DataSettings", "TextData", "check_vocabulary", "describe", "load_text", "unigram_perplexity"]

_FORMAT = 1  # of what the cache holds; a new number makes all of it anew
_SAMPLE_TOKENS = 60


class TrainStream(Protocol):
    """Samples 0, 1, 2, ... of the training of a run."""

    def batch(self, start: int, count: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` (rows, length) of those ``rows`` of samples start .. start + count - 1."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""


@dataclass(frozen=True)
class TextData:
    """Text ready for training."""

    tokenizer: PreTrainedTokenizerBase
    train: TrainStream
    validation: Sequences
    fingerprint: str
    """of the documents and all settings that decide the sequences; a resume compares it"""
    counts: dict[str, Counts]
    """of `train` and `validation`"""
    cache: Path


def load_text(settings: DataSettings, seed: int) -> TextData:
    """Prepare the text of ``settings``, or open it if the cache has it; ``seed`` draws the order of training.

    Safe to call on all ranks at once: one prepares, the others wait for it.

    Raises:
        UserError: settings or data that cannot work; nothing is left behind.
    """
    _check(settings)
    split = _split(settings)
    identity = _identity(settings, split)
    root = cache_root(settings.cache_dir)
    tokenizer = _tokenizer(settings, split, identity, root)
    length = settings.sequence_length
    fingerprint = sources.digest_of([*identity, tokenizer_digest(tokenizer), length, settings.packing])
    folder = built(root / f"text-{fingerprint}", partial(_prepare, settings, split, tokenizer))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if settings.streaming:
        train: Batches | Stream = Stream(split, Packed(tokenizer, length, settings.packing, pad), seed)
        train.state_dict()  # reads the first document: bad files are refused now
    else:
        train = Batches(Sequences(folder / "train.arrow", length, pad), seed)
    validation = Sequences(folder / "validation.arrow", length, pad)
    counts = {side: Counts(**values) for side, values in json.loads((folder / "counts.json").read_text()).items()}
    return TextData(tokenizer, train, validation, fingerprint, counts, folder)


def describe(data: TextData) -> str:
    """What was prepared, for a person: counts of both sides, the tokenizer, a decoded sample, where it is kept."""
    lines = [f"vocabulary   {len(data.tokenizer):,} tokens"]
    for side, counts in data.counts.items():
        lines.append(
            f"{side:<12} {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.sequences:,} sequences of "
            f"{data.validation.length}; {counts.bytes / counts.tokens:.2f} bytes a token"
        )
        left = f"{counts.unused_tokens:,} tokens unused"
        left += f", {counts.shared:,} documents also in validation" if counts.shared else ""
        left += f", {counts.blank:,} blank documents" if counts.blank else ""
        lines.append(f"{'':<12} left out: {left}")
    if isinstance(data.train, Stream):
        lines.insert(1, f"{'train':<12} streamed from {data.train.num_shards:,} shards, tokenized while training")
    sample = data.tokenizer.decode(data.validation.take(np.array([0]))["input_ids"][0][:_SAMPLE_TOKENS])
    return "\n".join([*lines, f"sample       {sample!r}", f"cache        {data.cache}"])


def _check(settings: DataSettings) -> None:
    for name in ("source", "validation"):
        value = getattr(settings, name)
        names = sources.names_of(value)
        if value is not None and not (names and all(names)):
            raise UserError(f"`data.{name}` = {value!r}: names no file; give files, folders, globs or a data set")
    if not 0 < settings.validation_fraction < 1:
        raise UserError(
            f"`data.validation_fraction` = {settings.validation_fraction}: must be a fraction between 0 and 1"
        )
    for name, least in (("sequence_length", 2), ("tokenizer_bytes", 1), ("stream_head", 1)):
        if getattr(settings, name) < least:
            raise UserError(f"`data.{name}` = {getattr(settings, name)}: must be at least {least}; raise it")


def _split(settings: DataSettings) -> Split:
    source, validation = sources.names_of(settings.source), sources.names_of(settings.validation)
    on_hub = sources.on_hub(settings.source)
    files = partial(sources.local_files, text_field=settings.text_field, rule=settings.text_documents)
    head = settings.stream_head if settings.streaming else None
    if on_hub and len(validation) > 1:
        raise UserError(f"`data.validation` = {validation}: a hub source is validated on one of its splits; name that")
    if on_hub:
        reach(source[0], "data set", "data.source")
        train, *own = (
            hub_source(source[0], settings.subset, split, settings.text_field, settings.streaming)
            for split in (settings.split, *validation)
        )
        return Split(train, own[0] if own else None, settings.validation_fraction, head)
    return Split(
        sources.builtin() if source == ["builtin"] else files("data.source", source),
        files("data.validation", validation) if validation else None,
        settings.validation_fraction,
        head,
    )


def _identity(settings: DataSettings, split: Split) -> list[Any]:
    """What decides the documents of both sides; validation is always read whole, so its digest is never sampled."""
    held_out = split.own.content(sampled=False) if split.own else settings.validation_fraction
    return [_FORMAT, split.source.content(sampled=settings.streaming), held_out, split.head]


def _tokenizer(settings: DataSettings, split: Split, identity: list[Any], root: Path) -> PreTrainedTokenizerBase:
    if settings.tokenizer is not None and settings.tokenizer != "bpe":
        return load_tokenizer(settings.tokenizer)
    key = sources.digest_of([*identity, settings.vocab_size, settings.tokenizer_bytes])

    def make(folder: Path) -> None:
        shown = _shown(split.source_documents(), "read for the tokenizer")
        train = (text for side, text in shown if side == "train")
        rules = train_bpe(train, settings.vocab_size, settings.tokenizer_bytes)
        (folder / "tokenizer.json").write_text(rules, encoding="utf-8")

    folder = built(root / f"tokenizer-{key}", make)
    return trained_bpe((folder / "tokenizer.json").read_text(encoding="utf-8"))


def _prepare(settings: DataSettings, split: Split, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the sequences of both sides (streaming: of validation) and their counts into ``folder``."""
    sides: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    packers = {
        side: Packer(folder / f"{side}.arrow", tokenizer, settings.sequence_length, settings.packing)
        for side in sides[settings.streaming :]
    }
    left_out = {"blank": 0, "shared": 0}
    for side, text in _shown(split.documents(), "tokenize"):
        if side in packers:
            packers[side].add(text)
        elif side in left_out:
            left_out[side] += 1
    counts = {side: packer.close() for side, packer in packers.items()}
    for side, count in counts.items():
        if not count.sequences:
            source = split.own if side == "validation" and split.own else split.source
            raise no_sequence(side, source.place, count.tokens, settings.sequence_length)
    values = {side: dataclasses.asdict(count) for side, count in counts.items()}
    if not settings.streaming:
        values["train"] |= left_out
    (folder / "counts.json").write_text(json.dumps(values))


def _shown(documents: Iterator[tuple[Side, str]], what: str) -> tqdm:
    return tqdm(documents, desc=what, unit=" documents", dynamic_ncols=True, disable=None)
