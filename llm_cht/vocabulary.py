"""How a translation model and its tokenizer fit: numbers of embeddings, special tokens, one table or one per language.

A new model takes all of it from the tokenizer, as far as the user has not said otherwise; a checkpoint brings its own
and is compared. Rejected: resizing the embeddings of a checkpoint, which would train random rows without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_cht.errors import UserError

KEYS = frozenset(
    (
        *("vocab_size", "decoder_vocab_size", "share_encoder_decoder_embeddings"),
        *("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id", "forced_eos_token_id"),
    )
)
"""keys of a transformers config that follow the tokenizer"""


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of its tokenizer."""

    source: int
    """embeddings that source sentences need: their largest token number, special tokens included, + 1"""
    target: int
    """the same of target sentences"""
    pad: int
    """token numbers; of both languages, where each has a vocabulary"""
    eos: int
    joint: bool
    """one vocabulary for both languages"""
    bos: int | None = None


def filled(values: Mapping[str, Any], known: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    """The keys of a transformers config with those of ``KEYS`` that lack.

    A decoder starts with the end token if it does so in stock models of the type (BART), else with padding (Marian,
    T5). Both tables of embeddings get the size of the larger vocabulary: transformers' beam search takes `vocab_size`,
    which is the source's, for the number of target tokens. ``known`` is the default config of the type.

    Raises:
        UserError: a given size is too small, or given ones differ; a given number of a token is another than the
            tokenizer's; the model type has one table of embeddings and the languages a vocabulary each.
    """
    place, wanted = "`model.config` or `model.overrides`", dict(values)
    for key, number in (("pad_token_id", vocabulary.pad), ("eos_token_id", vocabulary.eos)):
        if wanted.setdefault(key, number) != number:
            raise UserError(f"{place}: `{key}` = {wanted[key]}, the tokenizer has {number}; leave it out")
    start = getattr(known, "decoder_start_token_id", None)  # T5 has it in checkpoints only
    starts_with_eos = start is not None and start == known.eos_token_id
    wanted.setdefault("decoder_start_token_id", vocabulary.eos if starts_with_eos else vocabulary.pad)
    for key, token in (("bos_token_id", vocabulary.bos), ("forced_eos_token_id", vocabulary.eos)):
        if hasattr(known, key):
            wanted.setdefault(key, token)
    shared = True
    if hasattr(known, "share_encoder_decoder_embeddings"):
        shared = wanted.setdefault("share_encoder_decoder_embeddings", vocabulary.joint)
    _check_shared(shared, vocabulary, f"{place}: {type(known).__name__}")
    needed = max(vocabulary.source, vocabulary.target)
    size = wanted.setdefault("vocab_size", needed)
    if not isinstance(size, int) or size < needed:
        raise UserError(f"{place}: `vocab_size` = {size!r} is too small for a vocabulary of {needed}; leave it out")
    if hasattr(known, "decoder_vocab_size") and wanted.setdefault("decoder_vocab_size", size) != size:
        raise UserError(
            f"{place}: `decoder_vocab_size` = {wanted['decoder_vocab_size']} and `vocab_size` = {size}: the beam "
            "search of transformers needs them equal; set `vocab_size` alone"
        )
    return wanted


def prepare_generation(model: Any, vocabulary: Vocabulary) -> None:
    """Let ``generate`` of a new model run to its last position, and never write what is no target of training.

    That is padding, and what lies beyond the target vocabulary. Transformers has taken the special tokens from the
    model's config already.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    model.generation_config.suppress_tokens = [vocabulary.pad, *range(vocabulary.target, rows)]
    model.generation_config.max_length = getattr(model.config, "max_position_embeddings", None)


def check_checkpoint(model: Any, vocabulary: Vocabulary, path: str) -> None:
    """Refuse a checkpoint whose embeddings or special tokens are not those of ``vocabulary``.

    More embeddings than the tokenizer has tokens are common (padded tables) and fit.
    """
    place, remedy = f"`model.path` = {path!r}", "translate with the tokenizer of the checkpoint (`pairs.vocabulary`)"
    tables = (
        ("source", model.get_input_embeddings().weight.shape[0], vocabulary.source),
        ("target", model.get_output_embeddings().weight.shape[0], vocabulary.target),
    )
    for side, rows, size in tables:
        if rows < size:
            raise UserError(
                f"{place}: a vocabulary that does not match the checkpoint: {size} {side} tokens, {rows} embeddings; "
                f"{remedy}"
            )
    for key, number in (("pad_token_id", vocabulary.pad), ("eos_token_id", vocabulary.eos)):
        given = getattr(model.config, key, None)
        if given is not None and number not in (given if isinstance(given, list) else [given]):
            raise UserError(
                f"{place}: a vocabulary that does not match the checkpoint: its `{key}` is {given}, the tokenizer's "
                f"{number}; {remedy}"
            )
    _check_shared(getattr(model.config, "share_encoder_decoder_embeddings", True), vocabulary, place)


def _check_shared(shared: bool, vocabulary: Vocabulary, place: str) -> None:
    if shared and not vocabulary.joint:
        raise UserError(
            f"{place} has one table of embeddings for both languages, whose vocabularies are separate; "
            "set `pairs.joint: true`, or take a Marian model with `share_encoder_decoder_embeddings: false`"
        )
