"""Model from a config or from a checkpoint: stock ``transformers`` models, nothing of our own.

A name like ``llama_60m`` is a file of ``configs/models`` (in the wheel: ``llm_cht/configs/models``), a YAML of the keys
of the transformers config. Anything else is what ``AutoConfig`` and the ``AutoModel`` of the task accept.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from llm_cht.config import load_yaml
from llm_cht.errors import UserError
from llm_cht.files import absolute, is_path
from llm_cht.vocabulary import KEYS, Vocabulary, check_checkpoint, filled, prepare_generation

Kind = Literal["causal", "seq2seq"]
"""a decoder alone, for language modelling, or an encoder and a decoder, for translation"""

UNFIT = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError, StrictDataclassError)
"""what transformers raises for sizes that do not fit: it checks few, the others fail where they are first used"""


@dataclass
class ModelSettings:
    """Which model is trained."""

    config: str | None = "llama_60m"
    """Start from random weights: a name of configs/models, a YAML or JSON file, or a Hugging Face folder or name."""
    path: str | None = None
    """Start from the weights of a checkpoint: a Hugging Face folder or name; `config` is then ignored."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of the transformers config that differ, e.g. {vocab_size: 4096}."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


def configs_folder() -> Path:
    """The folder of shipped configs: beside the package in a clone, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    return next(place for place in (here / "configs", here.parent / "configs") if place.is_dir())


def reason_of(error: Exception) -> str:
    """An error of transformers as part of a sentence: its first line, or all of one whose first says only where."""
    said = str(error).strip()
    told = said if isinstance(error, StrictDataclassError) else said.partition("\n")[0]
    return " ".join(told.split()).rstrip(".") or type(error).__name__


def with_absolute_paths(settings: ModelSettings) -> ModelSettings:
    """``settings`` whose names of local files and folders mean the same from any working directory."""
    config, path = settings.config, settings.path
    if config is not None and not _shipped(config).is_file() and Path(config).expanduser().exists():
        config = absolute(config)
    if path is not None and Path(path).expanduser().exists():
        path = absolute(path)
    return replace(settings, config=config, path=path)


def build_model(
    settings: ModelSettings, seed: int, kind: Kind = "causal", vocabulary: Vocabulary | None = None
) -> PreTrainedModel:
    """The model in fp32, on the CPU; random weights are a function of ``seed``.

    ``vocabulary`` is for translation: a new model gets its sizes and special tokens, a checkpoint must fit it.

    Raises:
        UserError: a config or checkpoint that is not there or is of the other kind, an unknown config key, sizes that
            do not fit.
    """
    torch.manual_seed(seed)
    if settings.path is not None:
        model = _load(settings.path, settings, kind)
        if vocabulary is not None:
            check_checkpoint(model, vocabulary, settings.path)
    elif settings.config is not None:
        model = _fresh(settings.config, settings, kind, vocabulary)
    else:
        raise UserError("neither `model.config` nor `model.path` is set; name a config (llama_60m) or a checkpoint")
    heads, kv_heads = (getattr(model.config, f"num_{of}_heads", 1) for of in ("attention", "key_value"))
    if heads % kv_heads:
        raise UserError(
            f"the model has {heads} attention heads and {kv_heads} key-value heads, which must divide them; "
            "set `model.overrides.num_key_value_heads`"
        )
    return model


def check_kind(settings: ModelSettings, kind: Kind) -> None:
    """Refuse a checkpoint that is not there or is of the other kind, before anything is prepared for it.

    Raises:
        UserError: naming it.
    """
    if settings.path is not None:
        _check_kind(_config_of(settings.path).is_encoder_decoder, kind, f"`model.path` = {settings.path!r}")


def kind_of(config: Any) -> Kind:
    """What a transformers config describes."""
    return "seq2seq" if config.is_encoder_decoder else "causal"


def auto_class(kind: Kind) -> Any:
    """The class of transformers that makes models of a kind, each of its own stock class."""
    return {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[kind]


def _fresh(name: str, settings: ModelSettings, kind: Kind, vocabulary: Vocabulary | None) -> PreTrainedModel:
    written = _written_config(name)
    values = _stock_config(name) if written is None else written
    if written is None and vocabulary is not None:  # a config of the hub speaks of its own tokenizer
        values = {key: value for key, value in values.items() if key not in KEYS}
    values = values | settings.overrides
    model_type = values.pop("model_type", "none")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(
            f"`model.config` = {name!r}: transformers knows no model type `{model_type}`; correct it"
        ) from error
    _check_keys(known, (written or {}) | settings.overrides)
    _check_kind(values.get("is_encoder_decoder", known.is_encoder_decoder), kind, f"`model.config` = {name!r}")
    if vocabulary is not None:
        values = filled(values, known, vocabulary)
    try:
        config = AutoConfig.for_model(model_type, **values)
        model = auto_class(kind).from_config(config, dtype=torch.float32, attn_implementation=settings.attention)
    except (*UNFIT, ImportError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        raise UserError(
            f"`model.config` = {name!r} with `model.overrides` and `model.attention` cannot work: {reason}; "
            "correct them"
        ) from error
    if vocabulary is not None:
        prepare_generation(model, vocabulary)
    return model


def _written_config(name: str) -> dict[str, Any] | None:
    """The keys of a transformers config that a shipped or local file holds; None if there is no such file."""
    path = next((p for p in (_shipped(name), Path(name)) if p.is_file()), None)
    if path is None:
        return None
    values = load_yaml(path)
    if "model_type" not in values:
        raise UserError(
            f"`model.config` = {str(path)!r}: has no `model_type` key; write the keys of a transformers config"
        )
    return values


def _stock_config(name: str) -> dict[str, Any]:
    """All keys of a Hugging Face config, by folder or name."""
    known = ", ".join(sorted(path.stem for path in _shipped("*").parent.glob("*.yaml")))
    place = f"`model.config` = {name!r}: no shipped config ({known}), no file or folder here"
    if is_path(name) and not os.path.isdir(name):
        raise UserError(f"{place}, and no name of the hub; correct it")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except StrictDataclassError as error:
        raise UserError(
            f"`model.config` = {name!r}: its config.json cannot work: {reason_of(error)}; correct it"
        ) from error
    except (*UNFIT, OSError) as error:
        raise UserError(f"{place} and no Hugging Face model: {reason_of(error)}; correct it") from error


def _shipped(name: str) -> Path:
    return configs_folder() / "models" / f"{name}.yaml"


def meant(folder: Path) -> str:
    """The end of a sentence: which folder below one without config.json is the model, as in the folder of a run."""
    inner = next((path.parent for path in sorted(folder.glob("*/config.json"))), None)
    return f"; you mean {inner}" if inner else "; give the folder of a Hugging Face model"


def check_place(path: str) -> None:
    """Refuse a `model.path` that is no folder and can be no name of the hub, or lies in a folder that is here.

    Raises:
        UserError: naming it.
    """
    folder = Path(path).expanduser()
    beside = folder.parent != Path() and folder.parent.is_dir()  # runs/x where there is runs
    if (is_path(path) or beside) and not folder.is_dir():
        raise UserError(f"`model.path` = {path!r}: no folder here; give a Hugging Face model folder or hub name")


def _config_of(path: str) -> Any:
    check_place(path)
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"`model.path` = {path!r}: no model there, as it has no config.json{meant(Path(path))}")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (*UNFIT, OSError) as error:
        raise _no_model(path, error) from error


def _load(path: str, settings: ModelSettings, kind: Kind) -> PreTrainedModel:
    config = _config_of(path)
    _check_keys(config, settings.overrides, _of_another(settings))
    _check_kind(config.is_encoder_decoder, kind, f"`model.path` = {path!r}")
    try:
        with _without_reports():
            loaded: Any = auto_class(kind).from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation=settings.attention,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                trust_remote_code=False,  # None asks at the terminal
                **settings.overrides,
            )
    except (*UNFIT, ImportError, OSError, SafetensorError) as error:
        raise _no_model(path, error, _of_another(settings)) from error
    model, report = loaded
    lacking = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if lacking:
        raise UserError(
            f"`model.path` = {path!r}: {len(lacking)} weights are missing there or have another size, e.g. "
            f"`{lacking[0]}`; give a whole model{_of_another(settings)}"
        )
    _freeze(model)
    return model


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers' table of missing weights off the terminal: they are an error here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _freeze(model: PreTrainedModel) -> None:
    """Keep from training what a new model does not train (Marian's positions): loading forgets that, saving not."""
    with torch.device("meta"):
        new = auto_class(kind_of(model.config)).from_config(copy.deepcopy(model.config))
    for name, parameter in new.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad_(False)


def _of_another(settings: ModelSettings) -> str:
    """The end of a sentence: keys that are meant for `model.config` make a checkpoint another model."""
    if not settings.overrides:
        return ""
    keys = ", ".join(settings.overrides)
    return f", or set `model.overrides: {{}}`: its {keys} (of the command line or a config file) change the checkpoint"


def _no_model(path: str, error: Exception, more: str = "") -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"`model.path` = {path!r}: it runs Python code of its own, and a run ends in a folder for stock "
            "transformers; sparsify that model in a loop of your own (`llm_cht.sparsify`)"
        )
    place = f"`model.path` = {path!r}: cannot be loaded: {reason_of(error)}"
    return UserError(f"{place}; give a Hugging Face model folder or hub name{more}")


def _check_kind(encoder_decoder: bool, kind: Kind, place: str) -> None:
    if encoder_decoder and kind == "causal":
        raise UserError(
            f"{place}: a model with encoder and decoder, which `task: language_modelling` does not train; "
            "set `task: translation`, or take a model with a decoder alone (llama_60m)"
        )
    if not encoder_decoder and kind == "seq2seq":
        raise UserError(
            f"{place}: a model without encoder and decoder, which `task: translation` needs; "
            "set `task: language_modelling`, or take a translation model (marian_multi30k)"
        )


def _check_keys(config: Any, keys: Iterable[str], more: str = "") -> None:
    for key in keys:
        if not hasattr(config, key):
            raise UserError(
                f"`model.config` or `model.overrides`: {type(config).__name__} has no key `{key}`; correct it{more}"
            )
