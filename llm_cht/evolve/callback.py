"""``TopologyCallback``: topology updates inside the ``Trainer`` of transformers (and what derives from it, as TRL's).

    topology = sparsify(model, {"preset": "chts", "sparsity": 0.9})
    trainer = Trainer(model, arguments, train_dataset=..., callbacks=[TopologyCallback(topology)])

The same updater as everywhere; the Trainer's own engine (one process, DDP, DeepSpeed's ZeRO 1 to 3) stays as it set it
up. An update follows the optimizer step of its iteration. The learning rate is the Trainer's schedule times the
re-warm-up after an update; it is scaled before a step and put back after it, so that no scheduler notices. Each of the
Trainer's checkpoints gets the topology: ``topology_state*`` to resume from, of every rank, and ``topology.*`` as in all
model folders. Rejected: a Trainer of our own (nobody could combine it with another), and masks as persistent buffers
(a stock model would not load the checkpoint).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.library import SparseTraining, StepUpdater

_STATE = "topology_state"


class TopologyCallback(TrainerCallback):
    """Evolves the model of a ``Trainer``. ``updater`` is there from the beginning of the training on.

    Args:
        topology: what ``sparsify`` made of the Trainer's model.
        rewarm_steps: steps in which the learning rate climbs back after an update; 0: it is left alone.
        resume_from: folder of the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` names, where it is not
            in the output folder of the Trainer.
    """

    def __init__(self, topology: SparseTraining, rewarm_steps: int = 20, resume_from: str | None = None) -> None:
        if rewarm_steps < 0:
            raise UserError(
                f"`rewarm_steps` = {rewarm_steps}: must be at least 0, where the learning rate is left alone"
            )
        self.topology, self.rewarm_steps, self.resume_from = topology, rewarm_steps, resume_from
        self.updater: StepUpdater | None = None
        self.figures: list[dict[str, Any]] = []
        """of every topology update of this process, each with its ``step``"""
        self._rates: list[float] = []  # of the step under way, before they were scaled

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the updater, or take up that of the checkpoint."""
        _check_engine(args)
        model = _unwrapped(kwargs["model"])
        if model is not self.topology.sparse.model:
            raise UserError("the Trainer's model is not the one that was sparsified; give it that model")
        if dist.world_size() > 1:
            dist.open_control(args.ddp_timeout)
        self.updater = self.topology.updater(kwargs["optimizer"], state.max_steps)
        if state.global_step:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            with dist.together():
                load_state(self.updater, folder)
        self.updater.agree("after the start")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the forward passes of a step."""
        updater = self._updater
        updater.watch(state.global_step + 1)
        groups = kwargs["optimizer"].param_groups
        self._rates = [group["lr"] for group in groups]
        since = None if updater.last_update is None else state.global_step + 1 - updater.last_update
        if since is not None and since < self.rewarm_steps:
            for group in groups:
                group["lr"] *= since / self.rewarm_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer step, and after the scheduler set the next learning rate (where there is a scheduler)."""
        groups, scheduler = kwargs["optimizer"].param_groups, kwargs.get("lr_scheduler")
        rates = scheduler.get_last_lr() if scheduler is not None else self._rates
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        sound = not getattr(kwargs["optimizer"], "step_was_skipped", False)
        figures = self._updater.after(state.global_step, sound)
        if figures is not None:
            self.figures.append({"step": state.global_step, **figures})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the density among the Trainer's figures."""
        if logs is not None and "loss" in logs:
            logs["density"] = round(self.topology.density, 6)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the topology beside the weights of the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with dist.together():
            save_state(self._updater, folder)
            if dist.is_main():
                self.topology.save_topology(folder, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With ``load_best_model_at_end`` the weights are those of an earlier step, and the links go back too."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            with dist.together():
                load_state(self._updater, Path(state.best_model_checkpoint))

    @property
    def _updater(self) -> StepUpdater:
        assert self.updater is not None, "on_train_begin comes first"
        return self.updater


def _stay_on_cpu(storage: Any, location: str) -> Any:
    """The Trainer's ranks on CPU load their optimizer to "cpu:0", a place that torch does not know."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(100, lambda storage: None, _stay_on_cpu)


def save_state(updater: StepUpdater, folder: Path) -> None:
    """Write what this rank holds of the topology's state into a checkpoint; the values last, so that they tell all."""
    tensors, values = updater.state_dict()
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / f"{_STATE}-rank-{dist.rank():05d}.safetensors")
    if dist.is_main():
        about = values | {"world_size": dist.world_size(), "preset": updater.method.settings.preset}
        (folder / f"{_STATE}.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def load_state(updater: StepUpdater, folder: Path) -> None:
    """Go on with the topology of a checkpoint, saved by any number of ranks.

    Raises:
        UserError: the checkpoint has none, or one of another model.
    """
    try:
        values = json.loads((folder / f"{_STATE}.json").read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        for rank in range(values["world_size"]):
            tensors |= load_file(folder / f"{_STATE}-rank-{rank:05d}.safetensors")
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing: the checkpoint was saved without TopologyCallback, or lies elsewhere; name "
            "its folder: TopologyCallback(topology, resume_from=...)"
        ) from error
    updater.load_state_dict(tensors, values)
    for name, layer in updater.sparse.layers.items():
        if layer.weight.numel():  # under ZeRO 3 the weights are elsewhere
            off = int((layer.weight.detach() != 0).logical_and_(~layer.mask).count_nonzero())
            if off:
                raise UserError(f"{folder}: {off} weights of `{name}` lie off its mask; resume from another checkpoint")


def _check_engine(args: Any) -> None:
    launched = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if launched != args.world_size:
        raise UserError(
            f"torch.distributed has {launched} ranks, the Trainer {args.world_size}: they would train apart; on CPU "
            "set `use_cpu=True` and `ddp_backend='gloo'` in TrainingArguments"
        )
    if args.n_gpu > 1:
        raise UserError("the Trainer uses DataParallel, which copies the model; start one process per GPU (torchrun)")
    if getattr(args, "fsdp", None):
        raise UserError(
            "the Trainer is set up for FSDP, under which topology updates are not supported; use ZeRO or DDP"
        )


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module") and not hasattr(model, "config"):
        model = model.module
    return model
