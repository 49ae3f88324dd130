"""Small checkpoints to convert, and what is read of the results."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llm_cht.convert.run import Request, convert
from tests.sparse.family_checks import tokenizer

WORDS = 40
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes: Any) -> Path:
    """A random LLaMA in a folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer(WORDS).save_pretrained(folder)
    return folder


def converted(source: Path, folder: Path, **options: Any) -> Path:
    """``folder`` after a conversion with ``options``."""
    said: list[str] = []
    assert convert(Request(str(source), folder, **options), said.append)
    assert not said, said
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
