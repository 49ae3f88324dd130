"""Model from a config or from a checkpoint: stock ``transformers`` models, nothing of our own.

A name like ``llama_60m`` is a file of ``configs/models`` (in the wheel: ``llm_cht/configs/models``), a YAML of the keys
of the transformers config. Anything else is what ``AutoConfig`` and ``AutoModelForCausalLM`` accept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_cht.errors import UserError


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


def build_model(settings: ModelSettings, seed: int) -> PreTrainedModel:
    """The model in fp32, on the CPU; random weights are a function of ``seed``.

    Raises:
        UserError: a config or checkpoint that is not there, an unknown config key, sizes that do not fit.
    """
    torch.manual_seed(seed)
    if settings.path is not None:
        return _load(settings.path, settings)
    if settings.config is None:
        raise UserError("neither `model.config` nor `model.path` is set; name a config (llama_60m) or a checkpoint")
    values = _config_values(settings.config) | settings.overrides
    model_type = values.pop("model_type", "none")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(f"`model.config` {settings.config}: transformers knows no model type `{model_type}`") from error
    for key in values:
        if not hasattr(known, key):
            raise UserError(f"`model.config` or `model.overrides`: {type(known).__name__} has no key `{key}`")
    try:
        config = AutoConfig.for_model(model_type, **values)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=settings.attention)
    except (ValueError, TypeError, ImportError, StrictDataclassError) as error:
        raise UserError(f"`model.config` {settings.config} with `model.overrides` cannot work: {error}") from error


def _config_values(name: str) -> dict[str, Any]:
    """The keys of a transformers config by shipped name, file, or Hugging Face folder or name."""
    folder = configs_folder() / "models"
    path = next((p for p in (folder / f"{name}.yaml", Path(name)) if p.is_file()), None)
    if path is not None:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "model_type" not in values:
            raise UserError(f"`model.config` {path} has no `model_type` key; write the keys of a transformers config")
        return values
    try:
        return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        reason = str(error).splitlines()[0]
        raise UserError(
            f"`model.config` {name} is no shipped config ({known}), no file and no Hugging Face model: {reason}"
        ) from error


def _load(path: str, settings: ModelSettings) -> PreTrainedModel:
    if (os.sep in path or path.startswith(".")) and not Path(path).is_dir():
        raise UserError(f"`model.path` {path} is no folder; give a Hugging Face model folder or hub name")
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=settings.attention, **settings.overrides
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"`model.path` {path} cannot be loaded: {str(error).splitlines()[0]}") from error
