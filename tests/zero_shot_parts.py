"""Small models and made-up documents for the tests of ``eval/zero_shot.py``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm_cht.data.tokenizer import train_bpe, trained_bpe
from llm_cht.sparse.folder import write_topology
from tests.helpers import WORDS

MLP = "model.layers.0.mlp.up_proj"
FIELDS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
    "boolq": ("passage", "question"),
    "cb": ("premise", "hypothesis"),
    "copa": ("premise", "choice1", "choice2"),
}
CLASSES = {"mnli": 3, "cb": 3, "hellaswag": 4}


def write_data(folder: Path, number: int = 12) -> Path:
    """Made-up documents of every task, two thirds of them with label 1."""
    draw = np.random.default_rng(0)
    for task in [*FIELDS, "hellaswag"]:
        lines = []
        for document in range(number):
            texts = [" ".join(draw.choice(WORDS.split(), draw.integers(4, 9))) + "." for _ in range(6)]
            record: dict[str, Any] = dict(zip(FIELDS.get(task, ()), texts, strict=False))
            if task == "copa":
                record["question"] = ("cause", "effect")[document % 2]
            if task == "hellaswag":
                ctx = f"[header] {texts[0]} [title]  {texts[1]}"
                record = {
                    "activity_label": "Sparse links",
                    "ctx": ctx,
                    "endings": [f"[step] {text}" for text in texts[2:]],
                }
            label = int(draw.integers(CLASSES.get(task, 2))) if document % 3 == 0 else 1
            lines.append(json.dumps({**record, "label": label}) + "\n")
        place = folder / (
            "superglue" if task in ("boolq", "cb", "copa") else "other" if task == "hellaswag" else "glue"
        )
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{'mnli_matched' if task == 'mnli' else task}.jsonl").write_text("".join(lines))
    return folder


def new_model(folder: Path, seed: int, **changed: Any) -> LlamaForCausalLM:
    """A small model far from uniform, saved to ``folder`` with its tokenizer."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(
        **{**shape, "num_attention_heads": 2, "max_position_embeddings": 160, "initializer_range": 0.7, **changed}
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    trained_bpe(train_bpe([f"{WORDS} yes no True False positive negative Neither"], 320, 10**6)).save_pretrained(folder)
    return model


def new_constant(folder: Path, says: str, never: str) -> None:
    """A model that gives the tokens of `` says``, and not those of `` never``, the same high likelihood anywhere."""
    model = new_model(folder, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    liked = set(tokenizer(f" {says}")["input_ids"]) - set(tokenizer(f" {never}")["input_ids"])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 100
        model.model.norm.weight.copy_(torch.eye(16)[0])  # nothing but the one value that all tokens share comes out
        model.lm_head.weight.zero_()[list(liked), 0] = 5
    model.save_pretrained(folder)


def write_all(folder: Path) -> Path:
    """Models ``a``, ``b`` (sparse in a layer) and ``yes``, and ``data``."""
    new_model(folder / "a", 1)
    model = new_model(folder / "b", 2)
    mask = torch.arange(32 * 16).view(32, 16) % 4 == 0
    model.get_parameter(f"{MLP}.weight").data.mul_(mask)
    model.save_pretrained(folder / "b")
    write_topology(folder / "b", {MLP: mask}, "set", 1)
    new_constant(folder / "yes", "yes", "no")
    write_data(folder / "data")
    return folder
