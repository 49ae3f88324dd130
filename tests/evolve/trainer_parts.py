"""A tiny model, its data and arguments for the Trainer of transformers."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from llm_cht.evolve.library import SparseTraining

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def arguments(folder: Path, **more) -> TrainingArguments:
    plain = {"max_steps": 12, "report_to": [], "use_cpu": True, "save_steps": 4, "disable_tqdm": True}
    return TrainingArguments(str(folder), per_device_train_batch_size=2, **plain | more)


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (64, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def fresh():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def off_the_masks(topology: SparseTraining) -> int:
    layers = topology.sparse.layers.values()
    return sum(int((layer.weight.detach() != 0).logical_and(~layer.mask).sum()) for layer in layers)
