"""Sentence pairs for translation: settings, preparation and access.

``load_pairs`` reads the pairs, splits them, trains or loads the vocabulary, drops what is too long or too uneven, and
caches all of it; a second call with the same content and settings opens the cache. A pair is held out by a hash of its
source sentence, so that no sentence with two translations is on both sides. Training pairs that also stand in
validation or test are left out. What the user named for validation or test is never dropped: a line there that cannot
be used is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm_cht.data.cache import built, cache_root
from llm_cht.data.pair_batches import HeldOut, PairTokens, TokenBatches
from llm_cht.data.pair_encode import Limits, Report, SplitEncoder
from llm_cht.data.pair_files import Pair, PairSource, absolute_name, expanded, pair_sources
from llm_cht.data.pair_settings import PairSettings
from llm_cht.data.pair_store import PairCounts, PairStore, read_texts
from llm_cht.data.pair_vocabulary import (
    TRAINED,
    Encoder,
    Sample,
    VocabularySettings,
    check_tokenizer,
    open_vocabulary,
    pair_tokenizer_digest,
    pieces,
    train_vocabulary,
    vocabulary_sizes,
)
from llm_cht.data.sources import digest_of
from llm_cht.data.tokenizer import load_tokenizer
from llm_cht.errors import UserError
from llm_cht.files import absolute

__all__ = [
    "HeldOut",
    "PairCounts",
    "PairData",
    "PairSettings",
    "PairTokens",
    "TokenBatches",
    "check",
    "describe",
    "load_pairs",
    "untrained",
    "with_absolute_paths",
]

_FORMAT = 1  # of what the cache holds; a new number makes all of it anew
_CACHE = "pairs.cache_dir"
_HELD_OUT = ("validation", "test")


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
    if settings.train is None:
        raise UserError("`pairs.train` is not set; give two aligned files, a file of pairs or a data set of the hub")
    for name in ("train", *_HELD_OUT):
        value = getattr(settings, name)
        if value is not None and not (value and all(value)):
            raise UserError(f"`pairs.{name}` = {value!r}: names no file; give a name, or two files")
        if isinstance(value, list) and len(value) != 2:
            raise UserError(f"`pairs.{name}` lists {len(value)} files; give two, of source and target")
    for name in ("source", "target", "vocabulary", "split"):
        if not getattr(settings, name):
            raise UserError(f"`pairs.{name}` is empty; give a name")
    if settings.source == settings.target:
        raise UserError(f"`pairs.source` and `pairs.target` are both {settings.source!r}; give two languages")
    if not 0 < settings.validation_fraction < 1:
        raise UserError(
            f"`pairs.validation_fraction` = {settings.validation_fraction}: must be a fraction between 0 and 1"
        )
    for name, least in (("vocab_size", 4), ("max_length", 2)):
        if getattr(settings, name) < least:
            raise UserError(f"`pairs.{name}` = {getattr(settings, name)}: must be at least {least}; raise it")
    if settings.max_ratio is not None and not settings.max_ratio >= 1:
        raise UserError(f"`pairs.max_ratio` = {settings.max_ratio}: must be at least 1, or null for no limit")


def with_absolute_paths(settings: PairSettings) -> PairSettings:
    """``settings`` whose names of local files mean the same from any working directory.

    Raises:
        UserError: a path names an environment variable that is not set.
    """
    names: dict[str, Any] = {
        name: absolute_name(f"pairs.{name}", getattr(settings, name), settings) for name in ("train", *_HELD_OUT)
    }
    vocabulary, cache = expanded(settings.vocabulary, "pairs.vocabulary"), settings.cache_dir
    if vocabulary not in TRAINED and Path(vocabulary).exists():
        vocabulary = absolute(vocabulary)
    cache = None if cache is None else absolute(expanded(cache, _CACHE))
    return replace(settings, **names, vocabulary=vocabulary, cache_dir=cache)


def untrained(settings: PairSettings, of_checkpoint: bool) -> list[str]:
    """Names of given settings of a vocabulary to train, where a tokenizer is given (``of_checkpoint`` or named)."""
    trains, plain = settings.vocabulary in TRAINED, PairSettings()
    if trains and not of_checkpoint:
        return []
    names = ("vocabulary", "joint", "vocab_size", "lowercase") if trains else ("joint", "vocab_size", "lowercase")
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def load_pairs(
    settings: PairSettings, batch_tokens: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PairData:
    """Prepare the pairs of ``settings``, or open them if the cache has them.

    ``batch_tokens`` is the budget of a global batch, ``seed`` draws the order of training, ``tokenizer`` (that of a
    checkpoint) takes the place of `pairs.vocabulary`. Safe to call on all ranks at once: one prepares, the others wait.

    Raises:
        UserError: settings or data that cannot work; nothing is left behind.
    """
    check(settings)
    settings = with_absolute_paths(settings)
    split = _Split(pair_sources(settings), settings.validation_fraction)
    root = cache_root(settings.cache_dir)
    place = "the tokenizer of `model.path`"
    if tokenizer is None:
        tokenizer, place = _tokenizer(settings, split, root), f"`pairs.vocabulary` = {settings.vocabulary!r}"
    check_tokenizer(tokenizer, place)
    limits = Limits(settings.max_length, settings.max_ratio)
    key = digest_of([*split.identity, pair_tokenizer_digest(tokenizer), *asdict(limits).values()])
    folder = built(root / f"pairs-{key}", partial(_prepare, split, tokenizer, limits), _CACHE)
    reports = _reports(folder)
    reports["train"].check_budget(batch_tokens)
    pad = tokenizer.pad_token_id
    held_out = {
        name: HeldOut(PairStore(folder / name), pad, read_texts(folder / f"{name}.json"))
        for name in _HELD_OUT
        if name in reports
    }
    return PairData(
        tokenizer=tokenizer,
        train=TokenBatches(PairStore(folder / "train"), pad, batch_tokens, seed),
        validation=held_out["validation"],
        test=held_out.get("test"),
        fingerprint=digest_of([key, batch_tokens]),
        sizes=vocabulary_sizes(tokenizer),
        longest=max(report.longest_side for report in reports.values()),
        counts={name: report.counts for name, report in reports.items()},
        cache=folder,
    )


def describe(data: PairData) -> str:
    """What was prepared, for a person: vocabulary, counts of all splits, batches, two pairs, where it is kept."""
    source, target = data.sizes
    separate = getattr(data.tokenizer, "separate_vocabs", False)
    both = f"{source:,} tokens for the source, {target:,} for the target" if separate else f"{source:,} tokens, joint"
    lines = [f"vocabulary   {both}"]
    for name, counts in data.counts.items():
        tokens = counts.source_tokens + counts.target_tokens
        lines.append(
            f"{name:<12} {counts.kept:,} of {counts.read:,} pairs, {counts.source_tokens:,} source and "
            f"{counts.target_tokens:,} target tokens; {tokens / counts.kept:.1f} tokens a pair"
        )
        left_out = {
            "with an empty side": counts.dropped_empty,
            "too long": counts.dropped_long,
            "of too uneven lengths": counts.dropped_ratio,
            "also in validation or test": counts.dropped_shared,
        }
        reasons = [f"{number:,} {reason}" for reason, number in left_out.items() if number]
        lines.append(f"{'':<12} left out: {', '.join(reasons) or 'none'}")
    lines.append(f"{'batches':<12} {len(data.train):,} in epoch 0, {data.train.padding():.1%} padding")
    store = PairStore(data.cache / "train")
    for number, pair in enumerate(_reports(data.cache)["train"].samples):
        for side, (name, text) in enumerate(zip(("source", "target"), pair, strict=True)):
            shown = pieces(data.tokenizer, store.tokens(number, side).tolist(), side)
            lines.append(f"{name:<12} {text}\n{'':<12} {' '.join(shown)}")
    return "\n".join([*lines, f"cache        {data.cache}"])


@dataclass(frozen=True)
class _Split:
    """Which split each pair belongs to."""

    sources: dict[str, PairSource]
    fraction: float
    """of the training source that is held out where validation has no source of its own"""

    @cached_property
    def identity(self) -> list[Any]:
        """What decides the pairs of all splits."""
        fraction = None if "validation" in self.sources else self.fraction
        contents = {name: source.content() for name, source in self.sources.items()}
        return [_FORMAT, contents, fraction]

    def rows(self, what: str) -> Iterator[tuple[str, int, Pair]]:
        """Split, number and sentences of each pair, what the user named for validation and test first.

        The split of a training pair that is left out is the reason: `empty` or `shared`.

        Raises:
            UserError: an empty line in validation or test.
        """
        named: set[Pair] = set()
        with tqdm(desc=what, unit=" pairs", dynamic_ncols=True, disable=None) as bar:
            for name, source in sorted(self.sources.items(), key=lambda item: item[0] == "train"):
                for number, pair in source.pairs():
                    bar.update()
                    key = (pair[0].strip(), pair[1].strip())
                    if name == "train":
                        yield self._side(key, named), number, pair
                        continue
                    if not all(key):
                        place = source.where(number, int(bool(key[0])))
                        raise UserError(f"{place}: an empty line in `pairs.{name}`; delete the pair, or fill the line")
                    named.add(key)
                    yield name, number, pair

    def _side(self, key: Pair, named: set[Pair]) -> str:
        if not all(key):
            return "empty"
        if key in named:
            return "shared"
        if "validation" in self.sources:
            return "train"
        digest = hashlib.blake2b(key[0].encode(), digest_size=8).digest()
        return "validation" if int.from_bytes(digest, "big") < self.fraction * 2**64 else "train"


def _tokenizer(settings: PairSettings, split: _Split, root: Path) -> PreTrainedTokenizerBase:
    if settings.vocabulary not in TRAINED:
        return load_tokenizer(settings.vocabulary, "pairs.vocabulary")
    languages = settings.source, settings.target
    how = VocabularySettings(settings.vocabulary, settings.joint, settings.vocab_size, settings.lowercase, languages)

    def make(folder: Path) -> None:
        sample = Sample()
        for name, _, pair in split.rows("read for the vocabulary"):
            if name == "train":
                sample.add(pair)
        if not sample.pairs:
            raise UserError(f"{split.sources['train'].place}: no training pair; give pairs with text on both sides")
        train_vocabulary(sample.pairs, how, folder)

    key = digest_of([*split.identity, asdict(how)])
    return open_vocabulary(built(root / f"vocabulary-{key}", make, _CACHE))


def _prepare(split: _Split, tokenizer: PreTrainedTokenizerBase, limits: Limits, folder: Path) -> None:
    """Write the tokens of all splits, the sentences of validation and test, and what became of them."""
    encoder, train = Encoder(tokenizer), split.sources["train"]
    splits = {"train": SplitEncoder(folder / "train", encoder, limits, train, strict=False)}
    for name in _HELD_OUT:
        if name in split.sources or name == "validation":
            source, named = split.sources.get(name, train), name in split.sources
            splits[name] = SplitEncoder(folder / name, encoder, limits, source, named)
    left_out = {"empty": 0, "shared": 0}
    for name, number, pair in split.rows("encode"):
        if name in splits:
            splits[name].add(number, pair)
        else:
            left_out[name] += 1
    reports = {name: encoded.close() for name, encoded in splits.items()}
    counts = reports["train"].counts
    counts.read += sum(left_out.values())
    counts.dropped_empty += left_out["empty"]
    counts.dropped_shared += left_out["shared"]
    for name, report in reports.items():
        if not report.counts.kept:
            raise _nothing_left(name, split, report.counts)
    (folder / "reports.json").write_text(json.dumps({name: asdict(report) for name, report in reports.items()}))


def _nothing_left(name: str, split: _Split, counts: PairCounts) -> UserError:
    place = split.sources.get(name, split.sources["train"]).place
    dropped = {
        "empty": counts.dropped_empty,
        "longer than `pairs.max_length`": counts.dropped_long,
        "beyond `pairs.max_ratio`": counts.dropped_ratio,
        "also in validation or test": counts.dropped_shared,
    }
    why = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number) or "none read"
    remedy = "correct the data or those settings"
    if name == "validation" and name not in split.sources:
        remedy = "raise `pairs.validation_fraction`, or set `pairs.validation`"
    return UserError(f"{place}: no pair is left for {name} ({why}); {remedy}")


def _reports(folder: Path) -> dict[str, Report]:
    values = json.loads((folder / "reports.json").read_text())
    return {name: Report(**value | {"counts": PairCounts(**value["counts"])}) for name, value in values.items()}
