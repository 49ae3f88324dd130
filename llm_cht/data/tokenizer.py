"""Tokenizers: a byte-level BPE trained on the training documents, any of the hub or of a folder, sentencepiece models.

Documents are encoded as the tokenizer itself does it (a LLaMA tokenizer puts its begin token), plus an end token where
it puts none, so that the exported model sees in use what it saw in training. The trained tokenizer has <pad>, <s>, </s>
as 0, 1, 2 (a LLaMA config's numbers for begin and end) and puts none of them by itself; where a text spells one of
them, it is read as text.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from llm_cht.data.hub import reach
from llm_cht.errors import UserError

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
_NUM_BYTES = 256
_SPACE = "▁"  # as sentencepiece writes it
_SPECIAL = (PAD, BEGIN, END)
_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken")
"""of tokenizers, in the folder of a model"""


def train_bpe(documents: Iterable[str], vocab_size: int, max_bytes: int) -> str:
    """A byte-level BPE of at most ``vocab_size`` tokens, from the first documents up to ``max_bytes`` of text, as JSON.

    Raises:
        UserError: a vocabulary without room for the bytes and the special tokens.
    """
    smallest = _NUM_BYTES + len(_SPECIAL)
    if vocab_size < smallest:
        raise UserError(
            f"`data.vocab_size` = {vocab_size}: must be at least {smallest} for a byte-level tokenizer; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_first_bytes(documents, max_bytes), trainer)
    return tokenizer.to_str()


def trained_bpe(rules: str) -> PreTrainedTokenizerBase:
    """The tokenizer of ``train_bpe``'s result."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        split_special_tokens=True,
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has files of a tokenizer."""
    return any(next(folder.glob(pattern), None) for pattern in _FILES)


def load_tokenizer(
    name: str,
    setting: str = "data.tokenizer",
    remedy: str = "give a folder with `tokenizer.json`, a `.model` file or a name of the hub",
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, a sentencepiece `.model` file, or on the hub; ``setting`` is where the name stands.

    Raises:
        UserError: not found, not readable, without an end token or any other but special ones.
    """
    place = f"`{setting}` = {name!r}"
    path = Path(name).expanduser()
    if path.suffix == ".model":
        tokenizer = _sentencepiece(path, place)
    else:
        if not path.is_dir():
            reach(name, "tokenizer", setting)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*sacremoses")  # Marian's own: its normalizer is not used
                tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:  # TypeError: Marian without its files
            reason = (str(error).splitlines() or [""])[0].rstrip(" :")
            raise UserError(f"{place}: no tokenizer can be loaded from it: {reason}; {remedy}") from error
        # of a model's folder without tokenizer transformers makes an empty one for some families: T5's has one token
        if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
            raise UserError(f"{place}: no tokenizer can be loaded from it: its files are not there; {remedy}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{place}: it has no end token, which separates documents; take a tokenizer with an eos token")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token numbers (int64) of each text, an end token last."""
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(ids if ids and ids[-1] == end else [*ids, end], dtype=np.int64) for ids in encoded]


def smallest_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embeddings a model needs for this tokenizer: the largest number of a token, plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a model of ``vocab_size`` embeddings that is too small for the tokenizer.

    Raises:
        UserError: the tokenizer has tokens the model has no embedding for.
    """
    needed = smallest_vocabulary(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"the tokenizer has {needed} tokens and the model's vocabulary {vocab_size}; set the model's `vocab_size` "
            f"to {needed} or more, or take a smaller tokenizer (`data.vocab_size`)"
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides the tokens of a text."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    parts = f"{rules} {tokenizer.eos_token_id} {tokenizer.split_special_tokens}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def _sentencepiece(path: Path, place: str) -> PreTrainedTokenizerBase:
    """A sentencepiece model as a fast tokenizer that gives its very tokens; begin tokens are not added.

    transformers reads vocabulary and merges, but leaves out the model's own treatment of spaces, which is put back.
    """
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))  # loads it, or says that it is none
        spec = SentencePieceExtractor(str(path)).proto.normalizer_spec
    except (OSError, RuntimeError) as error:
        raise UserError(f"{place}: not a sentencepiece model file; correct the path or fetch it again") from error
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), split_special_tokens=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    first = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([*spaces, *first])
    return tokenizer


def _first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    seen = 0
    for text in documents:
        yield text
        seen += len(text.encode())
        if seen >= max_bytes:
            return
