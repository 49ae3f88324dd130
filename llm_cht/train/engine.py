"""Start of accelerate and of DeepSpeed, the device and precision of forward passes, and one optimizer step.

The launcher decides how many ranks there are and whether DeepSpeed cuts the optimizer between them (ZeRO); all that it
decides is checked here, because much of it fails silently: ranks that each believe to be alone, gradients that are
never summed, options that break the map of where a weight's master is. The run's own settings decide precision, batch
sizes and clipping, and are written over what a DeepSpeed config says.

accelerate is asked for no mixed precision of its own: its wrapper would copy the logits to fp32 a second time. Without
DeepSpeed the forward pass runs under ``torch.autocast`` over fp32 parameters, which then are the master weights; under
DeepSpeed bf16 parameters are the working copy of fp32 masters. ``accelerator.backward`` is not used under DeepSpeed: it
takes the optimizer step by itself, and a loss that is not finite could no longer be kept out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.shards import Shards, Whole, Zero3, Zero12
from llm_cht.train.rendezvous import init_method, meeting

Precision = Literal["bf16", "fp32", "pure_bf16"]

_BUCKET = 500_000_000  # DeepSpeed's own default, in elements
_COLLECTIVE_MARGIN_S = 30  # the watchdog speaks before a collective gives up


@dataclass(frozen=True)
class EngineSettings:
    """What the run asks of its engine."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Precision
    batch_size: int
    """sequences of an optimizer step, over all ranks, or tokens"""
    micro_batch_size: int | None
    """sequences of a forward pass on one rank, or tokens; None: all that it has"""
    clip_norm: float | None
    timeout_s: float
    skips_steps: bool
    """whether steps with a loss that is not finite are skipped"""
    by_tokens: bool = False
    """whether batches are counted in tokens: then their numbers of sequences differ, and are dealt out as they come"""


@dataclass
class Engine:
    """Where and how a run trains. ``prepare`` comes before the first forward pass."""

    accelerator: Accelerator
    settings: EngineSettings

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    @property
    def zero_stage(self) -> int:
        """Stage of DeepSpeed's ZeRO; 0 without DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin if self._deepspeed else None
        return 0 if plugin is None else int(plugin.deepspeed_config["zero_optimization"]["stage"])

    @property
    def name(self) -> str:
        """``one process``, ``ddp`` or ``zero-1`` to ``zero-3``."""
        if self.zero_stage:
            return f"zero-{self.zero_stage}"
        return "ddp" if dist.world_size() > 1 else "one process"

    @property
    def _deepspeed(self) -> bool:
        return self.accelerator.distributed_type is DistributedType.DEEPSPEED

    @property
    def share(self) -> slice:
        """The sequences of a global batch that are this rank's, where batches are counted in sequences."""
        count = self.settings.batch_size // dist.world_size()
        return slice(dist.rank() * count, (dist.rank() + 1) * count)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass on one rank."""
        return self.settings.micro_batch_size or self.settings.batch_size // dist.world_size()

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of one optimizer step on each rank."""
        if self.settings.by_tokens and self.settings.micro_batch_size:
            return math.ceil(self.settings.batch_size / dist.world_size() / self.settings.micro_batch_size)
        return 1 if self.settings.by_tokens else self.settings.batch_size // dist.world_size() // self.micro_batch_size

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of every forward pass."""
        if self.settings.precision == "bf16" and not self._deepspeed:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def model_dtype(self) -> torch.dtype:
        """Precision in which parameters are built; DeepSpeed makes its own working copy of fp32 ones."""
        return torch.bfloat16 if self.settings.precision == "pure_bf16" else torch.float32

    def prepare(self, callable_model: Any, model: nn.Module, optimizer: Optimizer) -> tuple[Any, Shards]:
        """The model as the loop calls it, and where weights and moments are. A collective.

        ``callable_model`` is ``model`` or its compiled form; ``model`` stays the same object.
        """
        if not self._deepspeed:
            return self.accelerator.prepare_model(callable_model), Whole(optimizer)
        zero_config = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        size = sum(parameter.numel() for parameter in model.parameters())
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # buffers larger than the model are a waste
            zero_config.setdefault(bucket, min(_BUCKET, size))
        inexact = self.settings.precision == "bf16"  # DeepSpeed will make the masters from the bf16 copy
        exact = {name: p.detach().clone() for name, p in model.named_parameters()} if inexact else {}
        wrapped, _ = self.accelerator.prepare(model, optimizer)
        if callable_model is not model:
            wrapped.compile()
        assert self.zero_stage == wrapped.zero_optimization_stage(), wrapped.zero_optimization_stage()
        zero = wrapped.optimizer
        shards = Zero3(zero, dist.rank()) if self.zero_stage == 3 else Zero12(zero)
        for name, parameter in model.named_parameters():
            if name in exact:
                shards.load(parameter, _reader(exact[name]))
        return wrapped, shards

    @contextlib.contextmanager
    def accumulate(self, forward: Any, last: bool) -> Iterator[None]:
        """Around a forward pass and its backward; gradients are summed over the ranks in the last of a step."""
        if self._deepspeed:
            forward.set_gradient_accumulation_boundary(is_boundary=last)
            yield
        else:
            with contextlib.nullcontext() if last or dist.world_size() == 1 else forward.no_sync():
                yield

    def backward(self, forward: Any, loss: Tensor) -> None:
        """Backward pass of one of ``accumulation_steps`` losses; their mean is what is optimized."""
        if self._deepspeed:
            forward.backward(loss)
        else:
            (loss / self.accumulation_steps).backward()

    def step(self, forward: Any, optimizer: Optimizer) -> float:
        """Clip and take the optimizer step; returns the gradient norm. Not finite: no step was taken.

        DeepSpeed finds a gradient that is not finite only while it steps; the caller must stop the run then.
        """
        if self._deepspeed:
            forward.step()
            norm = forward.get_global_grad_norm()
            return math.nan if norm is None else float(norm)
        limit = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = float(self.accelerator.clip_grad_norm_(forward.parameters(), limit))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self, optimizer: Optimizer) -> None:
        """Forget the gradients of a step that is skipped."""
        assert not self._deepspeed, "start_engine refuses to skip steps under DeepSpeed"
        optimizer.zero_grad(set_to_none=True)


def start_engine(settings: EngineSettings) -> Engine:
    """Start accelerate, the process group and, where the launcher asks for it, DeepSpeed's settings.

    Raises:
        UserError: CUDA is asked for where there is none; a launcher's option that cannot work; batch sizes that do not
            divide among the ranks; a rank that did not come.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("`train.device` = cuda: torch sees no CUDA device here; use `--train.device cpu` or auto")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    deepspeed = _asked("ACCELERATE_USE_DEEPSPEED")
    _check_launcher()
    if on_cpu and deepspeed:
        _without_compiled_operator()
    # gloo must be named for DeepSpeed on a CPU, else its ranks train while accelerate believes that each is alone
    group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu and deepspeed else None,
        init_method=init_method(),
        timeout=timedelta(seconds=settings.timeout_s + _COLLECTIVE_MARGIN_S),
    )
    # masks are buffers: equal by construction, and too large to be sent at every step
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    on_cpu_alone = on_cpu and not deepspeed
    with meeting():
        accelerator = Accelerator(
            mixed_precision="no", cpu=on_cpu_alone, gradient_accumulation_steps=1, kwargs_handlers=[group, ddp]
        )
        _check_world(accelerator)
        dist.open_control(settings.timeout_s)
    engine = Engine(accelerator, settings)
    _check_batch(settings)
    if deepspeed:
        _configure_deepspeed(engine)
    return engine


def _without_compiled_operator() -> None:
    """Keep DeepSpeed from compiling its operator for ranks that share memory: gloo does without.

    It takes a compiler and a minute or two, and a rank killed meanwhile leaves a lock for which every later run waits
    without a word.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _check_launcher() -> None:
    if _asked("ACCELERATE_USE_FSDP"):
        raise UserError(
            "the launcher asks for FSDP, under which topology updates are not supported; use DDP or DeepSpeed's ZeRO "
            "(launch/accelerate/)"
        )
    if _asked("ACCELERATE_USE_MEGATRON_LM") or _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError("the launcher asks for model parallelism; use DDP or DeepSpeed's ZeRO (launch/accelerate/)")
    if _asked("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise UserError("the launcher asks for DeepSpeed, which is not installed: pip install 'llm-cht[deepspeed]'")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise UserError(
            f"the launcher sets {steps} gradient accumulation steps; `train.batch_size` and `train.micro_batch_size` "
            "decide them: take gradient_accumulation_steps out of the accelerate config"
        )


def _check_world(accelerator: Accelerator) -> None:
    """What torch, accelerate and the launcher call the number of ranks must be one number."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not launched == accelerator.num_processes == dist.world_size():
        raise UserError(
            f"{launched} ranks were launched, torch.distributed has {dist.world_size()}, accelerate "
            f"{accelerator.num_processes}: they would train apart. Launch with launch/accelerate/*.yaml, and give "
            "`--train.device cpu` where there is no GPU"
        )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    if accelerator.distributed_type not in known:
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}; use one process, DDP or DeepSpeed's ZeRO "
            "(launch/accelerate/)"
        )


def _check_batch(settings: EngineSettings) -> None:
    world = dist.world_size()
    if settings.by_tokens:
        return
    if settings.batch_size % world:
        raise UserError(
            f"`train.batch_size` = {settings.batch_size} does not divide among {world} ranks; change one of them"
        )
    share = settings.batch_size // world
    if settings.micro_batch_size is not None and share % settings.micro_batch_size:
        raise UserError(
            f"`train.micro_batch_size` = {settings.micro_batch_size} does not divide the {share} sequences that "
            f"each of {world} ranks has of `train.batch_size` = {settings.batch_size}; change one of them"
        )


def _configure_deepspeed(engine: Engine) -> None:
    """Write the run's settings into DeepSpeed's config, and refuse what cannot work with topology updates."""
    settings, plugin = engine.settings, engine.accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    zero = config["zero_optimization"]
    if engine.zero_stage not in (1, 2, 3):
        raise UserError(
            "DeepSpeed's zero_stage 0 is DDP with another optimizer; launch with launch/accelerate/ddp.yaml"
        )
    if settings.precision == "pure_bf16":
        raise UserError("`train.precision` = pure_bf16 has no master weights to cut; under ZeRO use bf16 or fp32")
    if settings.skips_steps:
        raise UserError("`train.on_nonfinite` = skip: DeepSpeed cannot drop a step after backward; use stop under ZeRO")
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        if zero.get(key, -1) not in (-1, 1):
            raise UserError(
                f"DeepSpeed's `{key}` keeps a second copy of the weights that updates do not reach; remove it"
            )
    refused = {
        "round_robin_gradients": "it moves the pieces of weights to other ranks than DeepSpeed's own map says",
        "zero_quantized_weights": "gathered weights are then not the masters' values, nor exactly 0",
        "zero_quantized_gradients": "the gradients then differ between numbers of ranks",
    }
    for key, reason in refused.items():
        if zero.get(key):
            raise UserError(f"DeepSpeed's `{key}`: {reason}; take it out of the DeepSpeed config")
    if zero.get("offload_param", {}).get("device", "none") not in ("none", None):
        raise UserError("DeepSpeed's `offload_param` is not supported; offload the optimizer (offload_optimizer: cpu)")
    if zero.get("offload_optimizer", {}).get("device", "none") not in ("none", None, "cpu"):
        raise UserError("DeepSpeed's `offload_optimizer` works with device cpu only here, not nvme")
    for section in ("fp16", "optimizer", "scheduler", "tensor_parallel", "zenflow"):
        if str(config.get(section, {}).get("enabled", section in config and section != "fp16")).lower() == "true":
            raise UserError(f"the DeepSpeed config has `{section}`, which the run's own settings decide; take it out")
    # transformers would build models in pieces: the first topology is drawn on whole weights, before they are cut
    unset_hf_deepspeed_config()
    plugin.zero3_init_flag = False
    zero.setdefault("stage3_param_persistence_threshold", 0)
    micro = 1 if settings.by_tokens else engine.micro_batch_size  # DeepSpeed only checks that these fit together
    config |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": engine.accumulation_steps,
        "train_batch_size": micro * engine.accumulation_steps * dist.world_size(),
        "gradient_clipping": settings.clip_norm or 0.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # accelerate would swap the optimizer under offload
    }
    engine.accelerator.gradient_accumulation_steps = engine.accumulation_steps


def _reader(values: Tensor) -> Any:
    return lambda start, stop: values.view(-1)[start:stop]
