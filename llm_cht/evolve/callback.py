"""``TopologyCallback``: topology updates inside the ``Trainer`` of transformers (and what derives from it, as TRL's).

    topology = sparsify(model, {"preset": "chts", "sparsity": 0.9})
    trainer = Trainer(model, arguments, train_dataset=..., callbacks=[TopologyCallback(topology)])

The same updater as everywhere; the Trainer's own engine (one process, DDP, DeepSpeed's ZeRO 1 to 3) stays as it set it
up. An update follows the optimizer step of its iteration. The learning rate is the Trainer's schedule times the
re-warm-up after an update; it is scaled before a step and put back before the scheduler goes on, which may reckon from
it (DeepSpeed's engine steps the scheduler itself: there it must be one that does not, as the Trainer's own). Each of
the Trainer's checkpoints gets the topology: ``topology_state*`` to resume from, of every rank, and ``topology.*`` as in
all model folders. A resume must go on with the same resolved method, for the Trainer itself compares nothing; the
length may be another where the schedule does not hang on it. Rejected: a Trainer of our own (nobody could combine it
with another), and masks as persistent buffers (a stock model would not load the checkpoint).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.library import SparseTraining, StepUpdater

_STATE = "topology_state"
_MAY_CHANGE = {"workspace_mb", "force", "initial_path"}
"""settings that a resumed training may change: how it is computed, not what"""
_NO_ADAPTERS = (
    "the sparse weights stay as they are under adapters, and merging makes them dense; train the model itself, without "
    "TopologyCallback where only adapters shall learn"
)
_LOGGED = ("pruned", "removed", "percolated", "regrown", "overlap", "anp", "itop", "seconds_update")
"""figures of an update that the Trainer logs, each with ``topology/`` before it"""


class TopologyCallback(TrainerCallback):
    """Evolves the model of a ``Trainer``. ``updater`` is there from the beginning of the training on.

    Args:
        topology: what ``sparsify`` made of the Trainer's model.
        rewarm_steps: steps in which the learning rate climbs back after an update; 0: it is left alone; None: 20, or as
            many as lie between two updates.
        resume_from: folder of the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` names, where it is not
            in the output folder of the Trainer.
    """

    def __init__(
        self, topology: SparseTraining, rewarm_steps: int | None = None, resume_from: str | None = None
    ) -> None:
        interval = topology.settings.update_interval
        if rewarm_steps is not None and not 0 <= rewarm_steps <= interval:
            raise UserError(
                f"`rewarm_steps` = {rewarm_steps}: must lie between 0, where the learning rate is left alone, and "
                f"`update_interval` = {interval}, or it would not reach its peak between two updates"
            )
        self.topology, self.resume_from = topology, resume_from
        self.rewarm_steps = min(20, interval) if rewarm_steps is None else rewarm_steps
        self.updater: StepUpdater | None = None
        self.figures: list[dict[str, Any]] = []
        """of every topology update of this process, each with its ``step``"""
        self._rates: list[float] = []  # of the step under way, before they were scaled
        self._turn: Any = None  # of the scheduler, at the beginning of that step
        self._logged = 0  # figures that are in the Trainer's logs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the updater, or take up that of the checkpoint."""
        _check_engine(args)
        _check_model(_unwrapped(kwargs["model"]), self.topology)
        if dist.world_size() > 1:
            dist.open_control(args.ddp_timeout)
        self.updater = self.topology.updater(kwargs["optimizer"], state.max_steps)
        _check_optimized(self.updater)
        if self.rewarm_steps:
            _check_scheduler(self.updater, _inner(kwargs.get("lr_scheduler")))
        if state.global_step:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            with dist.together():
                check_same(self._method(), state.max_steps, folder)
                load_state(self.updater, folder)
        else:
            _check_start(self.updater, self.topology)
        for layer in self.topology.sparse.layers.values():
            layer.captured = None  # of a step that broke off, as with auto_find_batch_size
        self.updater.agree("after the start")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the forward passes of a step."""
        updater = self._updater
        updater.watch(state.global_step + 1)
        groups = kwargs["optimizer"].param_groups
        self._rates = [group["lr"] for group in groups]
        self._turn = getattr(_inner(kwargs.get("lr_scheduler")), "last_epoch", None)
        since = None if updater.last_update is None else state.global_step + 1 - updater.last_update
        if since is not None and since < self.rewarm_steps:
            for group in groups:
                group["lr"] *= since / self.rewarm_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer step, and before the scheduler's, unless the engine has made that one already."""
        scheduler = _inner(kwargs.get("lr_scheduler"))
        done = getattr(scheduler, "last_epoch", None) != self._turn
        for group, rate in zip(
            kwargs["optimizer"].param_groups, scheduler.get_last_lr() if done else self._rates, strict=True
        ):
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After everything else of a step: the topology update, if one is due."""
        sound = not getattr(kwargs["optimizer"], "step_was_skipped", False)
        figures = self._updater.after(state.global_step, sound)
        if figures is not None:
            self.figures.append({"step": state.global_step, **figures})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the density, and the figures of an update since the last log, to the Trainer's own.

        The Trainer has put its figures into the history already, and integrations that come before this callback have
        reported them.
        """
        if logs is None or "loss" not in logs:
            return
        told = {"topology/density": round(self.topology.density, 6)}
        if self.figures[self._logged :]:
            last = self.figures[-1]
            told |= {f"topology/{name}": last[name] for name in _LOGGED if last[name] is not None}
            self._logged = len(self.figures)
        logs |= told
        state.log_history[-1] |= told

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the topology beside the weights of the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with dist.together():
            run = {"total_steps": state.max_steps, "save_only_model": args.save_only_model}
            save_state(self._updater, folder, run | {"settings": self._method()})
            if dist.is_main():
                self.topology.save_topology(folder, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With ``load_best_model_at_end`` the weights are those of an earlier step, and the links go back too.

        The moments are those of the last step: off the links that came back they would move weights in a second
        ``train()``, and begin anew.
        """
        if args.load_best_model_at_end and state.best_model_checkpoint:
            with dist.together():
                load_state(self._updater, Path(state.best_model_checkpoint))
            for layer in self.topology.sparse.layers.values():
                none = torch.zeros(0, dtype=torch.int64, device=layer.mask.device)
                self._updater.shards.write(layer.weight, ~layer.mask.view(-1), none, none.float())

    def _method(self) -> dict[str, Any]:
        """What a resume must have in common with the training that it goes on with."""
        return _schedule(self._updater) | {"rewarm_steps": self.rewarm_steps}

    @property
    def _updater(self) -> StepUpdater:
        assert self.updater is not None, "on_train_begin comes first"
        return self.updater


def _stay_on_cpu(storage: Any, location: str) -> Any:
    """The Trainer's ranks on CPU load their optimizer to "cpu:0", a place that torch does not know."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(100, lambda storage: None, _stay_on_cpu)


def save_state(updater: StepUpdater, folder: Path, run: Mapping[str, Any]) -> None:
    """Write what this rank holds of the topology's state into a checkpoint; the values last, so that they tell all.

    ``run``: what a resume must know of the training: ``settings``, ``total_steps`` and ``save_only_model``.
    """
    tensors, values = updater.state_dict()
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / f"{_STATE}-rank-{dist.rank():05d}.safetensors")
    if dist.is_main():
        about = values | {"world_size": dist.world_size(), **run}
        (folder / f"{_STATE}.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def check_same(now: Mapping[str, Any], total_steps: int, folder: Path) -> None:
    """Refuse to go on with a checkpoint by another method than ``now``; one that tells none is taken, with a warning.

    Raises:
        UserError: a setting that decides about the topology differs, or the checkpoint has the weights alone.
    """
    saved = _values(folder)
    if saved.get("save_only_model"):
        raise UserError(
            f"{folder} was saved with `save_only_model`: the optimizer's moments and the place in the learning rate "
            "schedule are lost; start a new training from its weights (`initial: file`), or save without that option"
        )
    if "settings" not in saved:
        warnings.warn(
            f"{folder} was saved by a version that did not note the method: see to it that settings and max_steps are "
            "the same",
            stacklevel=2,
        )
        return
    then = saved["settings"]
    odd = [key for key in now if key in then and now[key] != then[key]]
    if not odd:
        return
    told = ", ".join(f"`{key}` = {then[key]!r} there and {now[key]!r} here" for key in odd)
    remedy = "give `sparsify` what was saved"
    if "end_step" in odd:
        remedy += (
            f"; `end_step` is 0.75 of max_steps ({saved['total_steps']} there, {total_steps} here) unless it is given: "
            f"train as long as before, or for another length with `end_step: {then['end_step']}`"
        )
    raise UserError(f"{folder} was trained by another method, {told}: {remedy}")


def load_state(updater: StepUpdater, folder: Path) -> None:
    """Go on with the topology of a checkpoint, saved by any number of ranks.

    Raises:
        UserError: the checkpoint has none, or one of another model.
    """
    values = _values(folder)
    tensors: dict[str, Tensor] = {}
    for rank in range(values["world_size"]):
        tensors |= _read(load_file, folder / f"{_STATE}-rank-{rank:05d}.safetensors")
    updater.load_state_dict(tensors, values)
    for name, layer in updater.sparse.layers.items():
        own = updater.shards.fragment(layer.weight)  # under ZeRO 3 the weights are nowhere else
        if own is not None:
            missing = ~layer.mask.view(-1)[own.start : own.stop]
            off = int((own.master != 0).logical_and_(missing.to(own.master.device)).count_nonzero())
            if off:
                raise UserError(
                    f"{folder}: {off} weights of `{name}` lie off its mask; if the Trainer resumes from a checkpoint "
                    "of another folder, name it: TopologyCallback(topology, resume_from=FOLDER); else take another one"
                )


def _values(folder: Path) -> dict[str, Any]:
    return _read(lambda path: json.loads(path.read_text(encoding="utf-8")), folder / f"{_STATE}.json")


def _read(reader: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: the checkpoint was saved without TopologyCallback, or its save was cut off (delete it "
            "and take the one before), or it lies elsewhere: TopologyCallback(topology, resume_from=FOLDER)"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from another checkpoint") from error


def _schedule(updater: StepUpdater) -> dict[str, Any]:
    """What decides about the topology, resolved, as JSON gives it back; of no update at all the end is step 0."""
    method = updater.method
    kept = {key: value for key, value in asdict(method.settings).items() if key not in _MAY_CHANGE}
    kept["end_step"] = method.settings.end_step if method.updates.end_step else 0
    if method.settings.density == "constant":
        del kept["density_end_step"]  # the same as end_step
    told: dict[str, Any] = json.loads(json.dumps(kept | {"seed": updater.seed}))
    return told


def _check_model(model: Any, topology: SparseTraining) -> None:
    sparse = topology.sparse
    if model is not sparse.model:
        if hasattr(model, "peft_config"):
            raise UserError("the Trainer's model has PEFT adapters: " + _NO_ADAPTERS)
        raise UserError(
            "the Trainer's model is not the one that was sparsified; give it that model, and no `model_init`, which "
            "makes another (so does a hyperparameter search: make model, topology and Trainer anew for each trial)"
        )
    for name, layer in sparse.layers.items():
        if model.get_submodule(name) is not layer:
            raise UserError(f"layer `{name}` was replaced after `sparsify` (by an adapter of PEFT?): " + _NO_ADAPTERS)


def _check_optimized(updater: StepUpdater) -> None:
    """Links come and go by weights that learn; at others the method would only destroy."""
    known: set[int] | None = None
    if not updater.shards.sharded:  # DeepSpeed's groups hold pieces, and it takes all that wants a gradient
        known = {id(parameter) for group in updater.shards.optimizer.param_groups for parameter in group["params"]}
    for name, layer in updater.sparse.layers.items():
        if not layer.weight.requires_grad or (known is not None and id(layer.weight) not in known):
            raise UserError(
                f"the weight of the sparse layer `{name}` is frozen, or the optimizer does not have it; leave it "
                "dense: sparsify(model, config, SparseSettings(exclude=[...]))"
            )


def _inner(scheduler: Any) -> Any:
    """The scheduler below accelerate's and DeepSpeed's wrappers."""
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def _check_scheduler(updater: StepUpdater, scheduler: Any) -> None:
    """DeepSpeed's engine steps the scheduler at the scaled rates; one that reckons from them never finds back."""
    if updater.shards.sharded and scheduler is not None and not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"{type(scheduler).__name__} under DeepSpeed reckons from learning rates that are scaled after an update; "
            "take one of the Trainer's (`lr_scheduler_type`), or TopologyCallback(topology, rewarm_steps=0)"
        )


def _check_start(updater: StepUpdater, topology: SparseTraining) -> None:
    """A model that was trained already begins a new schedule, which one that starts with more links cannot."""
    now, first, rule = topology.density, topology.first_density, updater.method.settings.density
    if rule != "constant" and now != first:
        raise UserError(
            f"the model was trained already: its density is {now:.4f}, and `density: {rule}` began at "
            f"{first:.4f}; sparsify a new model (no second `train()`, no `auto_find_batch_size`), or resume "
            "from a checkpoint"
        )


def _check_engine(args: Any) -> None:
    launched = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if launched != args.world_size:
        raise UserError(
            f"torch.distributed has {launched} ranks, the Trainer {args.world_size}: they would train apart; on CPU "
            "set `use_cpu=True` and `ddp_backend='gloo'` in TrainingArguments"
        )
    if args.n_gpu > 1:
        raise UserError("the Trainer uses DataParallel, which copies the model; start one process per GPU (torchrun)")
    if args.save_total_limit == 1 and not args.load_best_model_at_end:
        raise UserError(
            "`save_total_limit` = 1: the Trainer deletes the last checkpoint before the next one has its topology, and "
            "a kill between the two would lose both; give 2"
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise UserError(
            "`enable_jit_checkpoint` saves without telling callbacks, so without the topology; leave it off, and save "
            "often enough (`save_steps`)"
        )
    if getattr(args, "fsdp", None):
        raise UserError(
            "the Trainer is set up for FSDP, under which topology updates are not supported; use ZeRO or DDP"
        )


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module") and not hasattr(model, "config"):
        model = model.module
    return model
