"""Root of the settings: nests what each room owns, adds the loop's own, and checks what no room can see alone."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from llm_cht import models
from llm_cht.data import pairs, sources
from llm_cht.data.pair_settings import PairSettings
from llm_cht.data.settings import DataSettings
from llm_cht.data.tokenizer import has_tokenizer
from llm_cht.errors import UserError
from llm_cht.files import absolute
from llm_cht.models import ModelSettings
from llm_cht.sparse.folder import has_links
from llm_cht.sparse.surgery import SparseSettings
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings
from llm_cht.train import lr
from llm_cht.train.decode import DecodeSettings
from llm_cht.train.engine import Precision
from llm_cht.train.lr import LrSettings
from llm_cht.train.metrics import MetricsSettings
from llm_cht.train.optim import OptimizerSettings


@dataclass
class TrainSettings:
    """The loop."""

    steps: int = 10000
    """Optimizer steps of the run."""
    batch_size: int = 512
    """Sequences per optimizer step, over all devices. Not for translation, whose batches are counted in tokens."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; null: the whole batch. Smaller ones are accumulated."""
    batch_tokens: int | None = None
    """Translation: tokens per optimizer step over all devices, at most; source and target both count, with padding."""
    micro_batch_tokens: int | None = None
    """Translation: about as many of these tokens per forward pass; null: all that a device has of the batch."""
    label_smoothing: float = 0.0
    """Translation: share of the target's probability that is spread over the whole vocabulary."""
    precision: Precision = "bf16"
    """bf16 compute over fp32 weights; fp32; or pure_bf16 (weights and moments in bf16, to reproduce 002)."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    timeout_s: float = 600.0
    """Seconds after which ranks stop waiting for one of them; a slower one must be awaited with a larger value."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop the run, or skip the step."""
    max_skipped: int = 10
    """With skip: the run stops after this many skipped steps."""


@dataclass
class ValidationSettings:
    """Perplexity, and BLEU of translations, while training and at the end."""

    every: int | None = 1000
    """Optimizer steps between validations; null: at the end only."""
    max_tokens: int | None = 500_000
    """Tokens per validation while training, null for all; the last one always uses everything.
    Not for translation, where all do."""
    batch_size: int | None = None
    """Sequences per forward pass; null: as in training. Not for translation, which goes by tokens as in training."""
    bleu_pairs: int | None = None
    """Translation: pairs of the validation data that are translated for BLEU, the first ones; null: all."""
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    """Translation: the beam search."""


@dataclass
class CheckpointSettings:
    """What is saved, and when."""

    every: int | None = 1000
    """Optimizer steps between checkpoints; null: on a signal and at the end only."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    save_best: bool = True
    """Also save whenever a validation is the best so far: lowest perplexity, or highest BLEU of translations."""
    export: Literal["last", "best", "average"] | None = None
    """Which weights become RUN/model: the last step's, the best checkpoint's, the mean of the last regular ones with
    the last topology; null: last, for translation best."""
    average: int = 5
    """Checkpoints that `export: average` takes the mean of."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of RUN/model."""


@dataclass
class RunSettings:
    """Everything that a run is."""

    run: str = "runs/default"
    """Folder of the run."""
    seed: int = 0
    """Of the weights, the topology and the order of the data."""
    resume: str | None = None
    """auto: the newest good checkpoint of the run folder, if any; or the path of a checkpoint or run."""
    task: Literal["language_modelling", "translation"] = "language_modelling"
    """What is learned: the next token of text (`data`), or the target sentence of a source sentence (`pairs`)."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """The model."""
    data: DataSettings = field(default_factory=DataSettings)
    """Text, tokenizer and sequences."""
    pairs: PairSettings = field(default_factory=PairSettings)
    """Sentence pairs and their vocabularies."""
    sparse: SparseSettings = field(default_factory=SparseSettings)
    """Which layers are sparse."""
    method: MethodSettings = field(default_factory=MethodSettings)
    """How the topology starts and evolves."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """The optimizer."""
    lr: LrSettings = field(default_factory=LrSettings)
    """The learning rate over time."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The loop."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """Perplexity while training."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Checkpoints and export."""
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    """What is written down."""


def resolved(settings: RunSettings) -> RunSettings:
    """The settings with everything filled in that the preset and the length of the run decide, and absolute paths.

    A run written down so goes on from any working directory.
    """
    settings = on_checkpoint(settings)
    return replace(
        settings,
        run=absolute(settings.run),
        model=models.with_absolute_paths(settings.model),
        data=sources.with_absolute_paths(settings.data),
        pairs=pairs.with_absolute_paths(settings.pairs) if settings.task == "translation" else settings.pairs,
        method=_method(settings),
        lr=lr.resolved(settings.lr, settings.train.steps),
        checkpoint=replace(settings.checkpoint, export=exported(settings)),
    )


def on_checkpoint(settings: RunSettings) -> RunSettings:
    """The settings with what `model.path` decides, where nothing else is set: tokenizer, first weights, first links.

    Raises:
        UserError: no such folder, or one without tokenizer: others' tokens would mean nothing to its weights.
    """
    path, method, data = settings.model.path, settings.method, settings.data
    needs_tokenizer = settings.task == "language_modelling" and data.tokenizer is None
    if path is None:
        return replace(settings, data=replace(data, tokenizer="bpe")) if needs_tokenizer else settings
    folder = Path(path).expanduser()
    models.check_place(path)
    if needs_tokenizer:
        if (folder / "config.json").is_file() and not has_tokenizer(folder):
            raise UserError(
                f"`model.path` = {path!r}: no tokenizer there, and other tokens mean nothing to its weights; name its "
                "tokenizer in `data.tokenizer` (`bpe` trains a new one)"
            )
        data = replace(data, tokenizer=path)
    if method.preset != "dense":
        if method.initial_weight is None:
            method = replace(method, initial_weight="keep")
        if method.initial is None and method.initial_path is None and has_links(folder):
            method = replace(method, initial="file", initial_path=path)
    return replace(settings, method=method, data=data)


def told_on_checkpoint(settings: RunSettings) -> str | None:
    """What a resolved run does with the links and weights of `model.path`; None: nothing to tell."""
    path, method = settings.model.path, settings.method
    if path is None or method.preset == "dense" or method.initial == "checkpoint":
        return None
    if method.initial == "file":
        own = method.initial_path == path
        return f"the first links are those of {method.initial_path}" + (" (`method.initial: file`)" if own else "")
    return (
        f"`method.initial: {method.initial}` draws the first links whatever the weights of `model.path` are, and those "
        "off them are lost; `method.initial: checkpoint` keeps the largest"
    )


def exported(settings: RunSettings) -> Literal["last", "best", "average"]:
    """Which weights become the model of the run."""
    return settings.checkpoint.export or ("best" if settings.task == "translation" else "last")


def _method(settings: RunSettings) -> MethodSettings:
    method: MethodSettings = resolve(settings.method, settings.train.steps, settings.task).settings
    return method if method.initial_path is None else replace(method, initial_path=absolute(method.initial_path))


def check(settings: RunSettings) -> None:
    """Refuse settings that cannot work, before anything is built or written.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    settings = on_checkpoint(settings)
    train = settings.train
    if not settings.run:
        raise UserError("`run` = '': names no folder; give one for what the run writes")
    positive = {
        "train.steps": train.steps,
        "train.batch_size": train.batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.batch_tokens": train.batch_tokens,
        "train.micro_batch_tokens": train.micro_batch_tokens,
        "train.max_skipped": train.max_skipped,
        "train.timeout_s": train.timeout_s,
        "validation.every": settings.validation.every,
        "validation.max_tokens": settings.validation.max_tokens,
        "validation.batch_size": settings.validation.batch_size,
        "validation.bleu_pairs": settings.validation.bleu_pairs,
        "checkpoint.every": settings.checkpoint.every,
        "checkpoint.keep_last": settings.checkpoint.keep_last,
        "checkpoint.average": settings.checkpoint.average,
    }
    for key, value in positive.items():
        if value is not None and value < 1:
            raise UserError(f"`{key}` = {value}: must be at least 1; raise it")
    if not 0 <= settings.seed < 2**63:
        raise UserError(f"`seed` = {settings.seed}: must lie between 0 and 2**63 - 1; give another")
    if train.clip_norm is not None and not train.clip_norm > 0:
        raise UserError(f"`train.clip_norm` = {train.clip_norm}: must be above 0; null switches clipping off")
    _check_task(settings)
    _check_export(settings)
    _check_length(settings)
    method = resolve(settings.method, train.steps, settings.task)
    if method.settings.initial == "checkpoint" and settings.model.path is None:
        raise UserError("`method.initial: checkpoint` takes the links from trained weights; give `model.path`")
    lr.check(settings.lr, train.steps)
    interval, rewarm = method.updates.interval, settings.lr.rewarm_steps
    if method.updates.count and settings.lr.rewarm != "off" and rewarm > interval:
        raise UserError(
            f"`lr.rewarm_steps` = {rewarm} is above `method.update_interval` = {interval}: the learning rate would "
            "not reach its peak between two updates; lower it, or set `lr.rewarm: off`"
        )
    settings.optimizer.check()
    if settings.optimizer.link_age and train.precision == "pure_bf16":
        raise UserError(
            "`optimizer.link_age`: bf16 counts to 256 only (`train.precision: pure_bf16`); set bf16 or fp32"
        )
    settings.metrics.check()


def _check_task(settings: RunSettings) -> None:
    """Refuse settings of the other task, which would be overlooked."""
    train = settings.train
    translates = settings.task == "translation"
    _check_none_of_other(settings)
    if translates:
        if train.batch_tokens is None:
            raise UserError("`train.batch_tokens` is not set: translation needs it; give the tokens of a step")
        if not 0 <= train.label_smoothing < 1:
            raise UserError(f"`train.label_smoothing` = {train.label_smoothing}: must be a fraction in [0, 1)")
        settings.validation.decode.check("validation.decode")
        pairs.check(settings.pairs)
        return
    micro = train.micro_batch_size or train.batch_size
    if train.batch_size % micro:
        raise UserError(
            f"`train.batch_size` = {train.batch_size} is no multiple of `train.micro_batch_size` = {micro}; "
            "change one of them"
        )


def _check_none_of_other(settings: RunSettings) -> None:
    plain, translates = RunSettings(), settings.task == "translation"
    of_text = {
        "data": [one.name for one in fields(DataSettings)],
        "train": ("batch_size", "micro_batch_size"),
        "validation": ("max_tokens", "batch_size"),
    }
    of_pairs = {
        "pairs": [one.name for one in fields(PairSettings)],
        "train": ("batch_tokens", "micro_batch_tokens", "label_smoothing"),
        "validation": ("bleu_pairs", "decode"),
    }
    foreign, other = (of_text, "language_modelling") if translates else (of_pairs, "translation")
    here = {"data": "`pairs`", "pairs": "`data`", "train": f"`train.{'batch_tokens' if translates else 'batch_size'}`"}
    for section, keys in foreign.items():
        for key in keys:
            given = getattr(getattr(settings, section), key)
            if given == getattr(getattr(plain, section), key):
                continue
            hint = f" (here it is {here[section]} that counts)" if section in here else ""
            raise UserError(
                f"`{section}.{key}` = {given} belongs to `task: {other}`, and the task is {settings.task}; "
                f"leave it out{hint}, or set `task`"
            )


def _check_export(settings: RunSettings) -> None:
    checkpoint, kind = settings.checkpoint, exported(settings)
    if kind == "best" and not checkpoint.save_best:
        raise UserError(
            "`checkpoint.export: best` needs the best checkpoint; set `checkpoint.save_best: true`, or export the last"
        )
    if kind == "average" and checkpoint.keep_last < checkpoint.average:
        raise UserError(
            f"`checkpoint.export: average` needs `checkpoint.keep_last` = {checkpoint.keep_last} to be at least "
            f"`checkpoint.average` = {checkpoint.average}; raise it"
        )


def _check_length(settings: RunSettings) -> None:
    """Refuse a shorter resumed run: RUN/config.yaml has steps resolved into it that its user never set."""
    ends = (settings.method.end_step, settings.method.density_end_step, settings.lr.warmup_steps)
    latest = max((step for step in ends if step is not None), default=0)
    if settings.resume is not None and latest > settings.train.steps:
        raise UserError(
            f"`train.steps` = {settings.train.steps}: the run to resume was longer (it has settings up to step "
            f"{latest}), and a resumed run keeps its length; leave `train.steps` as it was, or start another run"
        )
