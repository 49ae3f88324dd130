"""Vocabularies of sentence pairs: sentencepiece models in a stock ``MarianTokenizer``, and any tokenizer that exists.

A trained vocabulary has <pad>, </s>, <unk> as 0, 1, 2 on both sides; token numbers are sentencepiece's own, so that
millions of sentences are encoded by its threads instead of a Python loop. A text that spells a special token is read as
text: ``split_special_tokens`` is saved with the tokenizer, and `<` is always a character of the vocabulary, or a run of
unknown characters could come out as `<pad>`. Marian itself takes `>>...<<` at the start of a text for one token, a
language code; it becomes <unk>, here as in the exported folder.

`word` is a sentencepiece model of whole words whose normalizer puts spaces around punctuation (not apostrophe and
hyphen; it knows no context, so 3.5 is split too): raw text goes in here as well, and what comes out keeps those spaces.
Several unknown words in a row are one <unk>. Lower case is made by the normalizer as well, letter by letter:
sentencepiece's own case folding (nmt_nfkc_cf) writes ss for ß, which no reference does. Rejected: byte fallback (256
tokens of a small vocabulary), and a tokenizer of our own (an exported folder must open with stock transformers).
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers import MarianTokenizer, PreTrainedTokenizerBase

from llm_cht.data.sources import digest_of
from llm_cht.data.tokenizer import smallest_vocabulary, tokenizer_digest
from llm_cht.errors import UserError

TRAINED = ("bpe", "unigram", "word")

_PAD, _END, _UNKNOWN = 0, 1, 2
_SAMPLE_PAIRS = 1_000_000  # that train a vocabulary: some GB at work, and more change it no further
_COVERAGE = 0.999999  # of the text's characters: all of a small corpus, without the stray scripts of a crawled one
_THREADS = 16  # on any machine: unigram scores are summed by thread, and another number gives another vocabulary
_PUNCTUATION = re.compile(r"\.\.\.|[,.!?;:\"()\[\]{}„“”«»\u2039\u203a¿¡…]")


@dataclass(frozen=True)
class VocabularySettings:
    """What decides a trained vocabulary, besides the text."""

    kind: str
    joint: bool
    size: int
    lowercase: bool
    languages: tuple[str, str]


class Sample:
    """A uniform sample of the pairs added to it, always the same, of bounded size."""

    def __init__(self, size: int = _SAMPLE_PAIRS) -> None:
        self.pairs: list[tuple[str, str]] = []
        self._size, self._seen = size, 0
        self._draw = random.Random(0)  # its stream is promised not to change

    def add(self, pair: tuple[str, str]) -> None:
        """Take a pair, or leave it."""
        self._seen += 1
        if len(self.pairs) < self._size:
            self.pairs.append(pair)
        elif (place := int(self._draw.random() * self._seen)) < self._size:
            self.pairs[place] = pair


def train_vocabulary(pairs: list[tuple[str, str]], how: VocabularySettings, folder: Path) -> None:
    """Train the vocabulary, or both, on ``pairs`` and write a Marian tokenizer into ``folder``.

    Raises:
        UserError: text or size that make no vocabulary.
    """
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    texts = [[*sides[0], *sides[1]]] * 2 if how.joint else sides
    for name, vocabulary, text, done in zip(
        ("source", "target"), ("vocab", "target_vocab"), texts, (False, how.joint), strict=True
    ):
        model = (folder / "source.spm").read_bytes() if done else _train(text, how)
        (folder / f"{name}.spm").write_bytes(model)
        if not done:
            (folder / f"{vocabulary}.json").write_text(json.dumps(_pieces(model)), encoding="utf-8")
    tokenizer = _quietly(
        MarianTokenizer,
        source_spm=str(folder / "source.spm"),
        target_spm=str(folder / "target.spm"),
        vocab=str(folder / "vocab.json"),
        target_vocab_file=None if how.joint else str(folder / "target_vocab.json"),
        source_lang=how.languages[0],
        target_lang=how.languages[1],
        separate_vocabs=not how.joint,
        split_special_tokens=True,
    )
    tokenizer.save_pretrained(folder)


def open_vocabulary(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that ``train_vocabulary`` wrote."""
    return _quietly(MarianTokenizer.from_pretrained, str(folder))


def vocabulary_sizes(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Embeddings a model needs for source and target: the largest token number, plus one."""
    source = smallest_vocabulary(tokenizer)
    return source, max(tokenizer.target_encoder.values()) + 1 if _is_separate(tokenizer) else source


def pair_tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides the tokens of both sides."""
    parts = [tokenizer_digest(tokenizer)]
    if isinstance(tokenizer, MarianTokenizer):
        models = (tokenizer.spm_source, tokenizer.spm_target)
        parts += [digest_of(model.serialized_model_proto().hex()) for model in models]
    if _is_separate(tokenizer):
        parts.append(digest_of(tokenizer.target_encoder))
    return digest_of([*parts, getattr(tokenizer, "src_lang", None), getattr(tokenizer, "tgt_lang", None)])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer that training of pairs cannot use.

    Raises:
        UserError: it has no padding token or no end token.
    """
    for token, name in ((tokenizer.pad_token_id, "padding"), (tokenizer.eos_token_id, "end")):
        if token is None:
            raise UserError(f"{place}: it has no {name} token; take the tokenizer of a sequence-to-sequence model")


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], side: int) -> list[str]:
    """The pieces of text that tokens of the source (side 0) or the target (side 1) stand for."""
    if side == 0 and _is_separate(tokenizer):
        by_number = {number: piece for piece, number in tokenizer.encoder.items()}
        return [by_number[token] for token in tokens]
    return list(tokenizer.convert_ids_to_tokens(tokens))


class Encoder:
    """Sentences to token numbers, as the tokenizer does it; a target always ends with the end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id
        self._models = _own_models(tokenizer)
        self._ends_target = self._end in tokenizer(text_target="a")["input_ids"]
        self.sizes = vocabulary_sizes(tokenizer)
        self.blank = [len(self([""], side)[0]) for side in (0, 1)]
        """tokens of a source and of a target without text"""

    def __call__(self, texts: list[str], side: int) -> list[np.ndarray]:
        """Tokens (int32) of each text; side 0 is the source, 1 the target."""
        if not self._models:
            return self._slowly(texts, side)
        tokens = self._models[side].encode(texts, return_type="numpy", add_eos=True, num_threads=-1)
        coded = [number for number, text in enumerate(texts) if text.startswith(">>") and "<<" in text]
        for number, given in zip(coded, self._slowly([texts[number] for number in coded], side), strict=True):
            tokens[number] = given
        return tokens

    def _slowly(self, texts: list[str], side: int) -> list[np.ndarray]:
        if not texts:
            return []
        given = {"text_target" if side else "text": texts}
        tokens = self._tokenizer(**given, return_attention_mask=False, verbose=False)["input_ids"]
        end = [self._end] if side and not self._ends_target else []
        return [np.array([*ids, *end], dtype=np.int32) for ids in tokens]


def _own_models(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Source and target model of a tokenizer whose token numbers are those of the models; else none."""
    if not isinstance(tokenizer, MarianTokenizer) or not tokenizer.split_special_tokens:
        return []
    models = [tokenizer.spm_source, tokenizer.spm_target]
    vocabularies = [tokenizer.encoder, tokenizer.target_encoder if _is_separate(tokenizer) else tokenizer.encoder]
    same = all(_pieces(model) == vocabulary for model, vocabulary in zip(models, vocabularies, strict=True))
    ends = all(model.eos_id() == tokenizer.eos_token_id == _END for model in models)
    return models if same and ends else []


def _pieces(model: sentencepiece.SentencePieceProcessor | bytes) -> dict[str, int]:
    if isinstance(model, bytes):
        model = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {model.id_to_piece(number): number for number in range(model.get_piece_size())}


def _is_separate(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "separate_vocabs", False))


def _quietly(make, *arguments, **options) -> PreTrainedTokenizerBase:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sacremoses")  # a normalizer that Marian makes and does not use
        return make(*arguments, **options)


def _train(texts: list[str], how: VocabularySettings) -> bytes:
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        rules: dict[str, Any] = {}
        if how.lowercase or how.kind == "word":
            path = Path(scratch, "rules.tsv")
            path.write_text(_rules(how.lowercase, spaced=how.kind == "word"), encoding="utf-8")
            rules = {"normalization_rule_tsv": str(path)}
        if sys.stderr.isatty():
            print(f"train a vocabulary on {len(texts):,} sentences", file=sys.stderr)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type=how.kind,
                vocab_size=how.size,
                hard_vocab_limit=False,
                character_coverage=_COVERAGE,
                required_chars="<",
                pad_id=_PAD,
                eos_id=_END,
                unk_id=_UNKNOWN,
                bos_id=-1,
                num_threads=_THREADS,
                minloglevel=3,
                **rules,
            )
        except (RuntimeError, ValueError) as error:
            raise _failed(str(error), how, len(texts)) from error
    return model.getvalue()


def _failed(reason: str, how: VocabularySettings, count: int) -> UserError:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason)
    if needed:
        return UserError(
            f"`pairs.vocab_size` = {how.size}: the characters of the training pairs alone need {needed[1]}; raise it"
        )
    return UserError(
        f"`pairs.vocabulary` = {how.kind!r}: sentencepiece made no vocabulary of {count:,} training sentences "
        f"({reason}); give more text, or lower `pairs.vocab_size`"
    )


@lru_cache(1)
def _rules(lowercase: bool, spaced: bool) -> str:
    """Sentencepiece's default normalization (nmt_nfkc) as a table of rules, with changes: code points and tabs."""
    known = dict(sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").Decompile())
    if lowercase:
        for character in map(chr, range(sys.maxunicode + 1)):
            if character.lower() != character:
                known.setdefault(character, character)
        known = {given: made.lower() for given, made in known.items()}
    if spaced:
        known = {given: _PUNCTUATION.sub(r" \g<0> ", made) for given, made in known.items()}
        marks = [chr(code) for code in range(0x3000) if _PUNCTUATION.fullmatch(chr(code))]
        known |= {mark: f" {mark} " for mark in ["...", *marks] if mark not in known}
    return "".join(f"{_code_points(given)}\t{_code_points(made)}\n" for given, made in known.items())


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)
