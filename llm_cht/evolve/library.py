"""``sparsify``: sparse training for a loop that is not ours; the surgery, the first topology, and the updater to come.

A training loop of its own needs five lines: ``topology = sparsify(model, {"preset": "chts"})`` before its optimizer is
made, ``updater = topology.updater(optimizer, total_steps)`` after it, ``updater.watch(step)`` before a step's forward
passes and ``updater.after(step)`` behind its optimizer step. Everything is the engine's own: same rules, same random
numbers, same checks. The length of the training is not known when the model is made, so that the schedule is fixed
where the updater is; the start depends on neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from llm_cht.errors import UserError, nearest
from llm_cht.evolve.shards import shards_of
from llm_cht.evolve.start import Calibrate, Start, check_start, draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.folder import write_topology
from llm_cht.sparse.surgery import SparseModel, SparseSettings
from llm_cht.sparse.surgery import sparsify as swap_layers
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings


class StepUpdater(TopologyUpdater):
    """A ``TopologyUpdater`` for a plain loop."""

    def after(self, step: int, sound: bool = True) -> dict[str, Any] | None:
        """What follows optimizer step ``step`` (1, 2, ...): the figures of its topology update, None if there is none.

        ``sound``: whether the step was taken; a skipped one has no gradient to regrow by. A collective on many ranks.
        """
        self.learned(step, sound)
        if not self.due(step):
            return None
        return self.update(step, prune_only=not sound and self.method.needs_gradient(step))


@dataclass(frozen=True)
class SparseTraining:
    """A model with its first topology."""

    sparse: SparseModel
    settings: MethodSettings
    seed: int
    start: Start
    first_density: float
    """that of the first topology"""

    @property
    def density(self) -> float:
        """Existing links over all positions of the sparse layers, now."""
        return self.sparse.density

    def updater(self, optimizer: Any, total_steps: int) -> StepUpdater:
        """The updater of a training of ``total_steps`` optimizer steps by ``optimizer`` (Adam, AdamW or SGD).

        ``optimizer`` may be wrapped by accelerate, or be DeepSpeed's of ZeRO 1 to 3.

        Raises:
            UserError: settings that do not fit the length.
        """
        updater = StepUpdater(self.sparse, resolve(self.settings, total_steps), shards_of(optimizer), self.seed)
        updater.own_std = self.start.own_std
        return updater

    def save_topology(self, folder: str | Path, step: int = 0) -> None:
        """Write topology.safetensors and topology.json beside a model saved by ``save_pretrained``."""
        write_topology(Path(folder), self.sparse.masks, self.settings.preset, step, transposed=self.sparse.transposed)


def sparsify(
    model: nn.Module,
    config: MethodSettings | Mapping[str, Any],
    layers: SparseSettings | None = None,
    seed: int = 0,
    calibrate: Calibrate | None = None,
) -> SparseTraining:
    """Make ``model`` sparse in place: swap its linear layers and draw the first topology.

    Comes before the optimizer is made and before any engine wraps the model or cuts its weights; on many ranks each
    calls it with the same model and seed.

    Args:
        model: a transformers model, or any module with ``layers`` given.
        config: the method, ``MethodSettings`` or the same as a mapping: ``{"preset": "chts", "sparsity": 0.9}``.
        layers: which layers; None: the projections of the model's family.
        seed: of the topology.
        calibrate: runs the model on samples; for ``initial: csti``.

    Raises:
        UserError: an unknown setting, a preset without a topology, or a model that cannot be made sparse; it is then
            untouched.
    """
    settings = config if isinstance(config, MethodSettings) else MethodSettings(**_known(config))
    if settings.preset == "dense":
        raise UserError("the preset dense has no topology; train the model as it is, or choose another `preset`")
    method = resolve(settings, _some_length(settings))
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "the weights of the model are cut by ZeRO 3 already; make the model before `TrainingArguments`, and "
            "sparsify it then"
        )
    sparse = swap_layers(model, layers or SparseSettings())
    check_start(sparse, method)
    start = draw_start(sparse, method, seed, calibrate)
    return SparseTraining(sparse, settings, seed, start, sparse.density)


def _some_length(settings: MethodSettings) -> int:
    """A number of steps that the settings allow: the start is the same for any."""
    named = (settings.end_step, settings.density_end_step, *(settings.density_table or ()))
    steps = [step for step in (*named, *(settings.regrowth_from or ())) if step is not None]
    return 2 * max(100 * settings.update_interval, *steps, 1)


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(MethodSettings)]
    for key in config:
        if key not in known:
            raise UserError(f"unknown setting `{key}` of the method; {nearest(key, known)}")
    return dict(config)
