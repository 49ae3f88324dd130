"""What a run learns, as the loop sees it: a task gives batches, a loss, what validation measures, and FLOPs.

The loop, the engine and the checkpoints know no task. There are two, a module each: the next token of text
(``language_modelling.py``) and the target of a source sentence (``translation.py``). Rejected: one class with a branch
at every difference, and a trainer class per task, each with a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """One optimizer step's batch, as one rank has it."""

    parts: Sequence[Inputs]
    """this rank's share, one for each of its forward passes"""
    targets: int
    """predicted tokens in this rank's share"""
    lengths: Any = None
    """of all ranks' sequences together, where the FLOPs depend on them"""


class Task(Protocol):
    """Data and meaning of a run."""

    tokenizer: Any
    stream: Any
    """the training batches: ``state_dict`` and ``load_state_dict`` of plain values"""
    fingerprint: str
    """of all that decides the batches; a resume compares it"""
    figure: str
    """what chooses the best checkpoint: a name in the validation's figures"""
    higher: bool
    """whether a higher one is better"""
    partial: bool
    """whether validations while training look at a part of the validation data"""

    def batch(self, step: int) -> Work:
        """The batch of optimizer step ``step`` (1, 2, ...); steps are asked for in order."""

    def count_targets(self, inputs: Inputs) -> int:
        """Predicted tokens."""

    def loss(self, forward: Any, inputs: Inputs, targets: float) -> Tensor:
        """What is minimised: a sum over the predicted tokens of ``inputs``, divided by ``targets``."""

    def cross_entropy(self, forward: Any, inputs: Inputs, targets: float) -> Tensor:
        """The same in nats, without regularisation."""

    def flops(self, work: Work, targets: int, density: float, dense_gradient: bool) -> float:
        """FLOPs of a step on the ``targets`` of all ranks at a density (1: the dense model)."""

    def validation(self, everything: bool) -> Iterable[Inputs]:
        """Batches that all ranks get alike: those of a validation while training, or ``everything``."""

    def measure(self, model: Any, watched: Callable[[Iterable[Any]], Iterator[Any]]) -> dict[str, Any]:
        """Further figures of a validation. A collective; ``watched`` wraps whatever takes long."""

    def calibrate(self, model: Any) -> None:
        """Run the first training sequences through the model (for links that start from correlations)."""

    def conclude(self, folder: Path, watched: Callable[[Iterable[Any]], Iterator[Any]]) -> dict[str, Any]:
        """Figures of the finished model in ``folder`` for the summary. A collective."""
