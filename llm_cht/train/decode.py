"""Translation by the beam search of transformers' own ``generate``, over batches of sources of nearly equal length.

What a sentence becomes does not depend on what shares its batch, but for the rounding of sums, for three reasons:

- The limit on a hypothesis is its own row's: a logits processor leaves only the end token once it is reached, whose
  probability it keeps, so that a hypothesis cut off has the score the model gives it. ``max_new_tokens`` alone would
  give every row the limit of the longest source in its batch.
- ``early_stopping=False``: a row is closed for good when its best running beam, at its present length, is no better
  than its worst finished one; that looks at nothing outside the row. "never" compares with the largest limit of the
  batch; True is independent too, but takes the first ``beams`` hypotheses to finish even if a better one is under way.
- The settings of generation come from ``DecodeSettings`` alone. ``generate`` fills whatever an explicit config leaves
  open from the folder's ``generation_config.json`` (repetition penalties, n-gram bans, a minimal length, ...), hence
  the model's own config is put aside meanwhile. Only its special tokens are kept.

The padding token is never generated (Marian's folders ban it by ``bad_words_ids``; here it is banned for every model).
Source and hypothesis are counted with their end tokens. Rejected: a beam search of our own; truncating long sources.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llm_cht import dist
from llm_cht.errors import UserError

Batch = list[int]
"""numbers of the sources that are translated together"""


@dataclass(frozen=True)
class DecodeSettings:
    """How sources are translated."""

    beams: int = 2
    """hypotheses followed at once; 1 is greedy search"""
    length_penalty: float = 1.0
    """a hypothesis is scored by its log-probability over its tokens to this power"""
    max_ratio: float = 2.0
    """a hypothesis has at most max_ratio * source tokens + max_extra tokens, and no more than the model's positions"""
    max_extra: int = 10
    """see max_ratio"""
    batch_tokens: int = 4096
    """bound of beams * sentences * longest source (tokens) of a batch; a longer sentence is a batch of its own"""

    def check(self, place: str) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the setting below ``place``, and the remedy.
        """
        for key, least in {"beams": 1, "max_ratio": 0, "max_extra": 0, "batch_tokens": 1}.items():
            if not getattr(self, key) >= least:
                raise UserError(f"`{place}.{key}` = {getattr(self, key)}: must be at least {least}; raise it")


def show_sentences(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches under a progress bar that counts sentences, where standard error is a terminal."""
    total = sum(map(len, batches))
    with tqdm(total=total, desc="translate", unit=" sentences", dynamic_ncols=True, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def translate(
    model: Any, tokenizer: Any, sources: Sequence[str], settings: DecodeSettings, **options: Any
) -> list[str]:
    """Hypotheses of ``sources``, in their order: ``Translator(model, tokenizer, settings, **options)(sources)``.

    Raises:
        UserError: as ``Translator``.
    """
    return Translator(model, tokenizer, settings, **options)(sources)


@dataclass(frozen=True)
class Translator:
    """Translates with one model; its training mode and generation config are the same afterwards."""

    model: Any
    """any encoder-decoder of transformers, on its device"""
    tokenizer: Any
    """encodes sources, decodes hypotheses"""
    settings: DecodeSettings
    order: Literal["sorted", "file"] = "sorted"
    """`sorted`: batches of similar lengths, longest first. `file`: as given, with as many sentences a batch on average:
    for comparisons"""
    collective: bool = False
    """all ranks call with the same sources: rank r of R takes batches r, r + R, ...; all get all hypotheses"""
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """entered around every call of the model"""
    shown: Callable[[Sequence[Batch]], Iterable[Batch]] = show_sentences
    """gives the batches back one by one, and may show how far they are"""

    def __call__(self, sources: Sequence[str]) -> list[str]:
        """Hypotheses in the order of the sources; a blank source becomes "" without a look at the model.

        Raises:
            UserError: a source has more tokens than the model has positions, the model does not name its end, padding
                or start token, or it gives a token that the tokenizer does not know.
        """
        hypotheses = [""] * len(sources)
        numbers = [number for number, source in enumerate(sources) if source.strip()]
        if not numbers:
            return hypotheses
        tokens = dict(zip(numbers, self.tokenizer([sources[n] for n in numbers])["input_ids"], strict=True))
        self._check(tokens)
        batches = self._batches({number: len(own) for number, own in tokens.items()})
        rank, world = (dist.rank(), dist.world_size()) if self.collective else (0, 1)
        own_batches = batches[rank::world]
        idle = len(batches[::world]) - len(own_batches)  # 0 or 1; under ZeRO 3 every call is a collective
        special = _special_tokens(self.model)
        training = self.model.training
        self.model.eval()
        try:
            with _config_put_aside(self.model):
                own = [row for batch in self.shown(own_batches) for row in self._generate(batch, tokens, special)]
                for batch in batches[:idle]:
                    self._generate(batch, tokens, special)
        finally:
            self.model.train(training)
        for r, rows in enumerate(dist.gather(own) if self.collective else [own]):
            translated = [number for batch in batches[r::world] for number in batch]
            for number, row in zip(translated, rows, strict=True):
                hypotheses[number] = self._text(row)
        return hypotheses

    def _check(self, tokens: dict[int, list[int]]) -> None:
        positions = _positions(self.model)
        for number, own in tokens.items():
            if positions is not None and len(own) > positions:
                raise self._error(
                    f"source line {number + 1}: {len(own)} tokens, but the model has {positions} positions; "
                    "shorten, split or leave out this line"
                )

    def _batches(self, lengths: dict[int, int]) -> list[Batch]:
        """Batches of numbers; ``lengths``: number -> tokens."""
        numbers, batches = sorted(lengths, key=lambda number: -lengths[number]), []
        while numbers:
            size = max(1, self.settings.batch_tokens // (self.settings.beams * lengths[numbers[0]]))
            batches.append(numbers[:size])
            numbers = numbers[size:]
        if self.order == "sorted":
            return batches
        in_order, size = list(lengths), -(-len(lengths) // len(batches))
        return [in_order[start : start + size] for start in range(0, len(in_order), size)]

    def _generate(self, batch: Batch, tokens: dict[int, list[int]], special: dict[str, Any]) -> list[list[int]]:
        """Tokens of the hypotheses, without start and end token."""
        settings, device = self.settings, self.model.device
        own = [tokens[number] for number in batch]
        longest, positions = max(map(len, own)), _positions(self.model)
        pad, end = special["pad_token_id"], special["eos_token_id"]
        inputs_RL = torch.tensor([row + [pad] * (longest - len(row)) for row in own], device=device)
        mask_RL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in own], device=device)
        wanted = (int(settings.max_ratio * len(row)) + settings.max_extra for row in own)
        limits = [max(1, min(limit, positions or limit)) for limit in wanted]
        config = GenerationConfig(
            num_beams=settings.beams,
            length_penalty=settings.length_penalty,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=max(limits),
            use_cache=True,
            **special,
        )
        rows = torch.tensor(limits, device=device).repeat_interleave(settings.beams)
        with self.autocast():
            found_RT = self.model.generate(
                inputs_RL,
                attention_mask=mask_RL,
                generation_config=config,
                logits_processor=LogitsProcessorList([_EndAtLimit(rows, pad, end)]),
                synced_gpus=self.collective and dist.world_size() > 1 and _is_sharded(self.model),
            )
        return [_up_to(end, row) for row in found_RT[:, 1:].tolist()]  # the first is the start token

    def _text(self, tokens: list[int]) -> str:
        try:
            return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        except IndexError:  # of sentencepiece, as Marian asks it
            raise self._error(
                f"the model gives token {max(tokens)}, which its tokenizer does not know; are they a pair?"
            ) from None

    def _error(self, message: str) -> UserError:
        return dist.agreed(message) if self.collective else UserError(message)


def _up_to(end: list[int], row: list[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in end), len(row))]


class _EndAtLimit(LogitsProcessor):
    """Leaves only the end token to rows that reach their limit, and never the padding token."""

    def __init__(self, limits_R: Tensor, pad: int, end: list[int]) -> None:
        """``limits_R``: tokens, end token included, of every row (beams of a sentence one after the other)."""
        self._limits_R1 = limits_R[:, None]
        self._banned = [pad] if pad not in end else []
        self._end = end[0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) of the next token; ``input_ids`` (rows, 1 + tokens so far)."""
        scores_RV = scores.clone()
        scores_RV[:, self._banned] = -torch.inf
        last_RV = torch.full_like(scores_RV, -torch.inf)
        end_R = scores_RV[:, self._end]
        last_RV[:, self._end] = torch.where(end_R == -torch.inf, 0.0, end_R)  # where a forced first token forbade it
        return torch.where(input_ids.shape[1] >= self._limits_R1, last_RV, scores_RV)


@contextlib.contextmanager
def _config_put_aside(model: Any) -> Iterator[None]:
    """Within it the model has no generation config of its own, and ``generate`` knows the size of its output.

    Beam search takes ``vocab_size`` for the number of scores, which is wrong for Marian with separate vocabularies.
    """
    config, generation_config = model.config.get_text_config(), model.generation_config
    size = config.vocab_size
    model.generation_config = GenerationConfig()
    config.vocab_size = getattr(config, "decoder_vocab_size", None) or size
    try:
        yield
    finally:
        model.generation_config = generation_config
        config.vocab_size = size


def _special_tokens(model: Any) -> dict[str, Any]:
    """The special tokens of generation: those of the folder's generation config, else of the model's config."""

    def of_model(name: str) -> Any:
        told = getattr(model.generation_config, name, None)
        return getattr(model.config, name, None) if told is None else told

    names = ("bos", "pad", "eos", "decoder_start", "forced_bos")
    found = {f"{name}_token_id": of_model(f"{name}_token_id") for name in names}
    for name in ("pad", "eos", "decoder_start"):
        if found[f"{name}_token_id"] is None:
            raise UserError(f"the model's config has no `{name}_token_id`, which translation needs; set it there")
    end = found["eos_token_id"]
    return found | {"eos_token_id": list(end) if isinstance(end, list | tuple) else [end]}


def _positions(model: Any) -> int | None:
    """Most tokens of a source or a hypothesis; None where positions are relative."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _is_sharded(model: Any) -> bool:
    """Whether ZeRO 3 has cut up the parameters, so that every forward pass is a collective."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
