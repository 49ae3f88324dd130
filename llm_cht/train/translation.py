"""The task of translating sentences: cross-entropy of the target with label smoothing, and BLEU of beam search.

The loss is computed here from the logits, because the sequence-to-sequence classes of ``transformers`` differ in theirs
(Marian's is a mean over padding and all), and none knows label smoothing. Rejected: the smoothing of OpenNMT and
fairseq, which leave the correct token or the padding out of the spread; torch's is the one of the label smoothing
paper (Szegedy et al. 2016), and for vocabularies of thousands they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llm_cht import dist
from llm_cht.data.pairs import HeldOut, PairData
from llm_cht.data.tokenizer import load_tokenizer
from llm_cht.errors import UserError
from llm_cht.train.bleu import Bleu, bleu, copy_baseline
from llm_cht.train.config import RunSettings
from llm_cht.train.decode import translate
from llm_cht.train.engine import Engine
from llm_cht.train.export import read_model
from llm_cht.train.flops import PairFlops
from llm_cht.train.task import Inputs, Work
from llm_cht.train.validate import validate
from llm_cht.vocabulary import Vocabulary

Watched = Callable[[Iterable[Any]], Iterator[Any]]


class Translation:
    """Sentence pairs; a batch is as many of like length as its tokens allow."""

    figure, higher, partial = "bleu", True, False

    def __init__(self, settings: RunSettings, data: PairData, engine: Engine, config: Any, flops: PairFlops) -> None:
        self._settings, self._data, self._engine, self._flops = settings, data, engine, flops
        self._start, self._pad = config.decoder_start_token_id, config.pad_token_id
        self.tokenizer, self.stream, self.fingerprint = data.tokenizer, data.train, data.fingerprint

    def batch(self, step: int) -> Work:
        """This rank's rows of the next batch."""
        parts, lengths = self._data.train.next(dist.rank(), dist.world_size(), self._engine.accumulation_steps)
        return Work(parts, sum(self.count_targets(part) for part in parts), lengths)

    def count_targets(self, inputs: Inputs) -> int:
        """Tokens of the target sentences, their end tokens included."""
        return int((inputs["labels"] != -100).sum())

    def loss(self, forward: Any, inputs: Inputs, targets: float) -> Tensor:
        """Cross-entropy with label smoothing."""
        return self._loss(forward, inputs, targets, self._settings.train.label_smoothing)

    def cross_entropy(self, forward: Any, inputs: Inputs, targets: float) -> Tensor:
        """Cross-entropy of the target sentences."""
        return self._loss(forward, inputs, targets, 0.0)

    def _loss(self, forward: Any, inputs: Inputs, targets: float, smoothing: float) -> Tensor:
        labels = inputs["labels"]
        logits = forward(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=shifted(labels, self._start, self._pad),
            use_cache=False,
        ).logits
        total = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="sum"
        )
        return total / targets

    def flops(self, work: Work, targets: int, density: float, dense_gradient: bool) -> float:
        """FLOPs of a step at a density."""
        return self._flops.of_step(work.lengths, round(density * self._flops.positions), dense_gradient)

    def validation(self, everything: bool) -> Iterable[Inputs]:
        """The validation pairs, in passes no larger than those of training on one rank."""
        train = self._settings.train
        size = train.micro_batch_tokens or train.batch_tokens
        assert size is not None
        return self._data.validation.batches(size)

    def measure(self, model: Any, watched: Watched) -> dict[str, Any]:
        """BLEU of the first validation pairs."""
        count = self._settings.validation.bleu_pairs
        return {"bleu": self._bleu(model, self._data.validation, watched, count, self._engine.autocast).score}

    def calibrate(self, model: nn.Module) -> None:
        """Run about as many of the first training pairs; the training itself begins with them all the same."""
        position = self.stream.state_dict()
        device, seen = next(model.parameters()).device, 0
        model.eval()
        while seen < self._settings.method.calibration_sequences:
            (part,), lengths = self._data.train.next(0, 1, 1)
            self.cross_entropy(model, {key: value.to(device) for key, value in part.items()}, 1)
            seen += lengths.pairs
        model.train()
        self.stream.load_state_dict(position)

    def conclude(self, folder: Path, watched: Watched) -> dict[str, Any]:
        """Perplexity of the finished model, and its BLEU on all validation pairs and on the test.

        The BLEU of copying the source stands beside.
        """
        model = read_model(folder, self._engine.device)
        figures: dict[str, Any] = {
            "perplexity": validate(model, watched(self.validation(True)), self._engine, self).perplexity
        }
        for name, pairs in {"": self._data.validation, "test_": self._data.test}.items():
            if pairs is not None:
                ours, copied = self._bleu(model, pairs, watched), copy_baseline(pairs.sources, pairs.references)
                figures |= {
                    f"{name}bleu": ours.score,
                    f"{name}bleu_lowercased": ours.lowercased,
                    f"{name}copy_bleu": copied.score,
                    "bleu_signature": ours.signature,
                }
        return figures

    def _bleu(
        self, model: Any, pairs: HeldOut, watched: Watched, count: int | None = None, autocast: Any = nullcontext
    ) -> Bleu:
        """BLEU of the first ``count`` pairs; ``autocast`` is entered around calls of the model."""
        sources: Sequence[str] = pairs.sources[:count]
        options = {"collective": True, "shown": watched, "autocast": autocast}
        hypotheses = translate(model, self.tokenizer, sources, self._settings.validation.decode, **options)
        return bleu(hypotheses, pairs.references[:count])


def shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """What the decoder reads to predict ``labels`` (rows, length): a start token, then all of them but the last."""
    inputs = labels.roll(1, dims=1).masked_fill_(labels.roll(1, dims=1) == -100, pad)
    inputs[:, 0] = start
    return inputs


def checkpoint_tokenizer(path: str) -> Any:
    """The tokenizer beside a checkpoint's weights.

    Raises:
        UserError: there is none.
    """
    return load_tokenizer(path, "model.path", "put the checkpoint's own there, or name one in `pairs.vocabulary`")


def vocabulary_of(pairs: PairData) -> Vocabulary:
    """What the model must know of the tokenizer."""
    tokenizer: Any = pairs.tokenizer
    joint = not getattr(tokenizer, "separate_vocabs", False)
    return Vocabulary(*pairs.sizes, tokenizer.pad_token_id, tokenizer.eos_token_id, joint, tokenizer.bos_token_id)


def check_positions(pairs: PairData, config: Any) -> None:
    """Refuse sentences that the model has no positions for.

    Raises:
        UserError: naming both lengths.
    """
    positions = getattr(config, "max_position_embeddings", None)  # T5's are relative
    if positions is not None and pairs.longest > positions:
        raise UserError(
            f"the longest sentence has {pairs.longest} tokens and the model {positions} positions; lower "
            "`pairs.max_length`, or set `model.overrides.max_position_embeddings`"
        )
