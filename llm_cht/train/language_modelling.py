"""The task of predicting the next token of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm_cht.data.text import TextData, unigram_perplexity
from llm_cht.errors import UserError
from llm_cht.train.config import RunSettings, exported
from llm_cht.train.engine import Engine
from llm_cht.train.export import read_model
from llm_cht.train.flops import Flops
from llm_cht.train.task import Inputs, Work
from llm_cht.train.validate import validate


class LanguageModelling:
    """Sequences of one length; a batch is a number of them."""

    figure, higher = "loss", False

    def __init__(self, settings: RunSettings, data: TextData, engine: Engine, flops: Flops) -> None:
        self._settings, self._data, self._engine, self._flops = settings, data, engine, flops
        self.tokenizer, self.stream, self.fingerprint = data.tokenizer, data.train, data.fingerprint
        self.partial = data.validation.part(settings.validation.max_tokens) < len(data.validation)

    def batch(self, step: int) -> Work:
        """This rank's rows of the batch."""
        size, micro = self._settings.train.batch_size, self._engine.micro_batch_size
        batch = self._data.train.batch((step - 1) * size, size, self._engine.share)
        slices = [slice(start, start + micro) for start in range(0, self._engine.accumulation_steps * micro, micro)]
        parts = [{key: value[rows] for key, value in batch.items()} for rows in slices]
        return Work(parts, self.count_targets(batch))

    def count_targets(self, inputs: Inputs) -> int:
        """All tokens but the first of a sequence and the ignored ones (label -100)."""
        return int((inputs["labels"][:, 1:] != -100).sum())

    def loss(self, forward: Any, inputs: Inputs, targets: float) -> Tensor:
        """transformers' own, divided by ``targets``."""
        loss: Tensor = forward(**inputs, use_cache=False, num_items_in_batch=targets).loss
        return loss

    cross_entropy = loss

    def flops(self, work: Work, targets: int, density: float, dense_gradient: bool) -> float:
        """FLOPs of a step at a density."""
        return self._flops.of_step(targets, round(density * self._flops.positions), dense_gradient)

    def validation(self, everything: bool) -> Iterable[Inputs]:
        """The validation sequences, or some spread evenly over them."""
        settings = self._settings.validation
        size = settings.batch_size or self._engine.micro_batch_size
        return self._data.validation.batches(size, None if everything else settings.max_tokens)

    def measure(self, model: Any, watched: Callable[[Iterable[Any]], Iterator[Any]]) -> dict[str, Any]:
        """Nothing beyond the perplexity."""
        return {}

    def calibrate(self, model: nn.Module) -> None:
        """Run the first training sequences; the training itself begins with them all the same."""
        position = self.stream.state_dict()
        samples = self._data.train.batch(0, self._settings.method.calibration_sequences)["input_ids"]
        self.stream.load_state_dict(position)
        device = next(model.parameters()).device
        model.eval()
        for rows in samples.split(self._engine.micro_batch_size):
            model(rows.to(device), use_cache=False)
        model.train()

    def conclude(self, folder: Path, watched: Callable[[Iterable[Any]], Iterator[Any]]) -> dict[str, Any]:
        """What token frequencies alone would reach; the perplexity, where the model is not the last step's."""
        figures = {"unigram_perplexity": unigram_perplexity(self._data.validation)}
        if exported(self._settings) != "last":
            model, batches = read_model(folder, self._engine.device), watched(self.validation(True))
            figures["perplexity"] = validate(model, batches, self._engine, self).perplexity
        return figures


def check_length(sequence_length: int, config: Any) -> None:
    """Refuse sequences that the model has no positions for.

    Raises:
        UserError: naming both lengths.
    """
    longest = getattr(config, "max_position_embeddings", None)  # some families have no bound
    if longest is not None and sequence_length > longest:
        raise UserError(
            f"`data.sequence_length` = {sequence_length} is above the model's `max_position_embeddings` = {longest}; "
            "lower it, or set `model.overrides.max_position_embeddings`"
        )
