"""A plain Hugging Face folder from a checkpoint: whatever engine trained it, there the weights are whole, in fp32.

The end of a run writes its folder this way, and so does ``llm-cht export`` on any checkpoint, on a machine without GPUs
and in one process. Rejected: gathering the weights of live ranks (a second way, different under every engine, that
needs the memory of all weights beside the training's).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.models import auto_class, kind_of
from llm_cht.sparse.folder import Topology, save_model_folder
from llm_cht.topology import bits
from llm_cht.train.checkpoint import Checkpoint, resolve

TOKENIZER = "tokenizer"
"""folder of the tokenizer in that of a run"""


def described(model: Any) -> dict[str, Any]:
    """What makes an empty model of the same kind, as JSON values."""
    configs = {"config": model.config, "generation_config": model.generation_config}
    return {key: json.loads(config.to_json_string(use_diff=False)) for key, config in configs.items() if config}


def write_model(checkpoints: Sequence[Checkpoint], tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the model of a checkpoint to ``folder``, its weights in ``dtype``, whole or not at all.

    Of several checkpoints, which must have the topology of the last one, the mean of the weights.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    checkpoint = checkpoints[-1]
    description = checkpoint.state["model"]
    config = AutoConfig.for_model(**description["config"])
    with torch.device("meta"):
        model = auto_class(kind_of(config)).from_config(config)
    if "generation_config" in description:
        model.generation_config = GenerationConfig.from_dict(description["generation_config"])
    shapes = {name: checkpoint.shape("model", f"{name}.weight") for name in _sparse(checkpoint)}
    masks = {name: bits.unpack(checkpoint.tensor("topology", f"mask.{name}"), shape) for name, shape in shapes.items()}
    preset = checkpoint.state["settings"]["method"]["preset"]
    weights = {name: _mean(checkpoints, name) for name in sorted(checkpoint.names("model"))}
    save_model_folder(folder, model, weights, tokenizer, Topology(masks, preset, checkpoint.step), dtype)


def read_model(folder: Path, device: torch.device) -> Any:
    """The model of a folder in fp32, as stock transformers has it; by every rank, which may be several machines."""
    with dist.together(patient=True):
        kind = auto_class(kind_of(AutoConfig.from_pretrained(folder)))
        return kind.from_pretrained(folder, dtype=torch.float32).to(device)


def same_topology(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints of a run have the same links."""
    return all(
        torch.equal(first.tensor("topology", f"mask.{name}"), second.tensor("topology", f"mask.{name}"))
        for name in _sparse(second)
    )


def _mean(checkpoints: Sequence[Checkpoint], name: str) -> Tensor:
    """Of a tensor, added up in float64."""
    own = checkpoints[-1].tensor("model", name)
    if len(checkpoints) == 1 or not own.is_floating_point():
        return own
    total = sum((other.tensor("model", name).double() for other in checkpoints[:-1]), own.double())
    return (total / len(checkpoints)).to(own.dtype)


def export(place: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write the model of a checkpoint, or of the newest good one of a run, to ``folder``; returns the checkpoint.

    Raises:
        UserError: no intact checkpoint there, or one of an older version; ``folder`` holds something else.
    """
    checkpoint = resolve(place, Path(place) / "checkpoints", print)
    if checkpoint is None:
        raise UserError(f"no checkpoint in {place}: give a run folder or a step-... folder in it")
    tokenizer = checkpoint.path.parent.parent / TOKENIZER
    if "model" not in checkpoint.state or not tokenizer.is_dir():
        raise UserError(
            f"{checkpoint.path} was saved by an older version, or its run has lost the folder `{TOKENIZER}`; "
            "resume the run to its end, which writes RUN/model"
        )
    write_model([checkpoint], AutoTokenizer.from_pretrained(tokenizer), folder, dtype)
    return checkpoint.path


def _sparse(checkpoint: Checkpoint) -> list[str]:
    names = checkpoint.names("topology") if "topology" in checkpoint.groups else set()
    return sorted(name.removeprefix("mask.") for name in names if name.startswith("mask."))
