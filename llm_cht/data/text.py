"""Text for a language model: settings, preparation and access.

``load_text`` reads the documents, splits them, trains or loads the tokenizer, packs, and caches all of it; a second
call with the same content and settings opens the cache.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_cht.data import sources
from llm_cht.data.cache import built, cache_root
from llm_cht.data.order import Batches
from llm_cht.data.pack import Counts, Packer, Sequences, unigram_perplexity
from llm_cht.data.settings import DataSettings
from llm_cht.data.split import Split
from llm_cht.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_digest, train_bpe
from llm_cht.errors import UserError

__all__ = ["DataSettings", "TextData", "check_vocabulary", "describe", "load_text", "unigram_perplexity"]

_FORMAT = 1  # of what the cache holds; a new number makes all of it anew


class TrainStream(Protocol):
    """Samples 0, 1, 2, ... of the training of a run."""

    def batch(self, start: int, count: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` (count, length) of samples start .. start + count - 1."""

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

    Raises:
        UserError: settings or data that cannot work; nothing is left behind.
    """
    _check(settings)
    split = _split(settings)
    place = [settings.text_field, settings.text_documents, settings.stream_head if settings.streaming else None]
    contents = [source.content(settings.streaming) if source else None for source in (split.source, split.own)]
    identity = [_FORMAT, *place, *contents, None if split.own else settings.validation_fraction]
    root = cache_root(settings.cache_dir)
    tokenizer = _tokenizer(settings, split, identity, root)
    how = [tokenizer_digest(tokenizer), settings.sequence_length, settings.packing]
    fingerprint = sources.digest_of([*identity, *how])
    folder = built(root / f"text-{fingerprint}", partial(_prepare, settings, split, tokenizer))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    counts = {side: Counts(**values) for side, values in json.loads((folder / "counts.json").read_text()).items()}
    train, validation = (
        Sequences(folder / f"{side}.arrow", settings.sequence_length, pad) for side in ("train", "validation")
    )
    return TextData(tokenizer, Batches(train, seed), validation, fingerprint, counts, folder)


def describe(data: TextData) -> str:
    """What was prepared, for a person."""
    return "\n".join(f"{side}: {counts}" for side, counts in data.counts.items()) + f"\n{data.cache}"


def _check(settings: DataSettings) -> None:
    if not 0 < settings.validation_fraction < 1:
        raise UserError(f"data.validation_fraction: {settings.validation_fraction}: give a fraction between 0 and 1")
    for name, least in (("sequence_length", 2), ("tokenizer_bytes", 1), ("stream_head", 1)):
        if getattr(settings, name) < least:
            raise UserError(f"data.{name}: {getattr(settings, name)}: must be at least {least}")


def _split(settings: DataSettings) -> Split:
    files = partial(sources.local_files, text_field=settings.text_field, rule=settings.text_documents)
    names = [settings.source] if isinstance(settings.source, str) else settings.source
    source = sources.builtin() if names == ["builtin"] else files("data.source", names)
    own = None
    if settings.validation is not None:
        own = files(
            "data.validation", [settings.validation] if isinstance(settings.validation, str) else settings.validation
        )
    return Split(source, own, settings.validation_fraction, settings.stream_head if settings.streaming else None)


def _tokenizer(settings: DataSettings, split: Split, identity: list[Any], root: Path) -> PreTrainedTokenizerBase:
    if settings.tokenizer != "bpe":
        return load_tokenizer(settings.tokenizer)
    key = sources.digest_of([*identity, settings.vocab_size, settings.tokenizer_bytes])

    def make(folder: Path) -> None:
        documents = (text for side, text in _shown(split, "train tokenizer") if side == "train")
        train_bpe(documents, settings.vocab_size, settings.tokenizer_bytes).save_pretrained(folder)

    return AutoTokenizer.from_pretrained(built(root / f"tokenizer-{key}", make))


def _prepare(settings: DataSettings, split: Split, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    sides = {
        side: Packer(folder / f"{side}.arrow", tokenizer, settings.sequence_length, settings.packing)
        for side in ("train", "validation")
    }
    left_out = {"blank": 0, "shared": 0}
    for side, text in _shown(split, "tokenize"):
        if side in sides:
            sides[side].add(text)
        else:
            left_out[side] += 1
    counts = {side: dataclasses.asdict(packer.close()) for side, packer in sides.items()}
    counts["train"] |= left_out
    (folder / "counts.json").write_text(json.dumps(counts))


def _shown(split: Split, what: str) -> tqdm:
    return tqdm(split.documents(), desc=what, unit=" documents", dynamic_ncols=True, disable=None)
