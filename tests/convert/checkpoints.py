"""Small checkpoints to convert, and what is read of the results."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_cht.convert.run import Request, convert
from llm_cht.evolve.start import draw_start
from llm_cht.sparse.surgery import SparseModel, SparseSettings, sparsify
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings
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


def started(dense: Path, by: str, budget: str) -> SparseModel:
    """The model of ``dense`` with the first links that a run at 80 % draws, with seed 3."""
    sparse = sparsify(AutoModelForCausalLM.from_pretrained(dense), SparseSettings())
    start = {"initial": by, "budget": budget}
    if by in ("magnitude", "ri"):
        pruning = {"magnitude": "magnitude", "ri": "relative_importance"}[by]
        start |= {"initial": "checkpoint", "pruning": pruning}
    draw_start(sparse, resolve(MethodSettings(preset="static", sparsity=0.8, **start), 10), seed=3)
    return sparse


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def llama_1b(folder: Path) -> int:
    """A LLaMA of 1.3 B random bf16 weights, made shard by shard; returns the number of weights."""
    torch.manual_seed(0)
    hidden, inner, words = 2048, 5461, 32000
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 24, "vocab_size": words}
    config = LlamaConfig(**sizes, num_attention_heads=32, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer(WORDS).save_pretrained(folder)
    ends = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"} | {"mlp.down_proj": (hidden, inner)}
    ends |= {f"mlp.{x}_proj": (inner, hidden) for x in ("gate", "up")}
    ends |= {f"{x}_layernorm": (hidden,) for x in ("input", "post_attention")}
    shards = [{"lm_head": (words, hidden), "model.embed_tokens": (words, hidden), "model.norm": (hidden,)}]
    for first in range(0, 24, 4):
        shards.append({f"model.layers.{i}.{n}": shape for i in range(first, first + 4) for n, shape in ends.items()})
    index = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {f"{n}.weight": torch.randn(shape).mul_(0.02).bfloat16() for n, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(math.prod(shape) for shapes in shards for shape in shapes.values())
