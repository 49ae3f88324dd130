"""Model folders and hub names of the command line: found, loaded, and how sparse they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
)

from llm_cht.data.hub import reach
from llm_cht.data.sources import is_local
from llm_cht.data.tokenizer import has_tokenizer
from llm_cht.errors import UserError
from llm_cht.models import UNFIT, Kind, kind_of, meant, reason_of
from llm_cht.sparse.folder import read_topology, verify_folder


def find(name: str, kind: Kind) -> None:
    """Refuse the name of a model that is neither a folder nor on the hub, or a folder with none of that kind."""
    if Path(name).is_dir():
        _check_folder(Path(name), kind)
        return
    if is_local(name):
        raise UserError(f"MODEL {name}: no such folder (looked from {Path.cwd()}); correct the path")
    reach(name, "tokenizer", "MODEL")


def _check_folder(folder: Path, kind: Kind) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"MODEL {folder}: no model here, as it has no config.json{meant(folder)}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise UserError(f"MODEL {folder}: its config.json cannot work: {reason_of(error)}; correct it") from error
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # said by ``load``, which knows what is trusted
        return
    if not _writes(config):
        raise UserError(
            f"MODEL {folder}: {config.model_type} is neither a language model nor an encoder-decoder of text; "
            "give a model that one of AutoModelForCausalLM and AutoModelForSeq2SeqLM is for"
        )
    if kind_of(config) != kind:
        found, program = (
            ("a language model", "perplexity.py") if kind == "seq2seq" else ("an encoder-decoder", "bleu.py")
        )
        raise UserError(f"MODEL {folder}: {config.model_type} is {found}; use eval/{program}")


def _writes(config: Any) -> bool:
    """Whether transformers has a class for it that writes text; not so for an encoder alone, as BERT or ViT."""
    if hasattr(config, "auto_map"):  # code of its own, of which transformers' lists know nothing
        return True
    if kind_of(config) == "seq2seq":
        return type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder


def load(kind: Any, name: str, what: str, **options: Any) -> Any:
    """``kind.from_pretrained``, whose errors become one sentence; ``what`` says which kind of model is wanted."""
    if kind is AutoTokenizer and Path(name).is_dir() and not has_tokenizer(Path(name)):
        raise UserError(f"{name}: {kind.__name__} cannot load it: no tokenizer there; copy the model's into the folder")
    try:
        return kind.from_pretrained(name, **options)
    except (*UNFIT, OSError, ImportError, SafetensorError) as error:
        remedy = f"give the folder or hub name of {what} with its tokenizer"
        raise UserError(f"{name}: {kind.__name__} cannot load it: {reason_of(error)}; {remedy}") from error


def load_model(kind: Any, name: str, what: str, dtype: str, **options: Any) -> Any:
    """A model whose weights are all there, in ``dtype``, on the CPU."""
    model, loading = load(kind, name, what, dtype=getattr(torch, dtype), output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise UserError(f"{name}: it has no weights for {min(loading['missing_keys'])}; copy or export it again")
    return model


def check_vocabulary(name: str, largest: int, embeddings: int) -> None:
    """Refuse a tokenizer whose token ``largest`` the model has no embedding for."""
    if largest >= embeddings:
        raise UserError(
            f"{name}: token {largest} of its tokenizer is none of the model's {embeddings}; are they a pair?"
        )


def sparsity(folder: Path) -> float | None:
    """Share of missing links in the layers of ``topology.json``, whose weights are checked to be 0 there."""
    if not (folder / "topology.json").exists():
        return None
    verify_folder(folder)
    masks = read_topology(folder).masks.values()
    links, size = sum(int(mask_OI.sum()) for mask_OI in masks), sum(mask_OI.numel() for mask_OI in masks)
    return 1 - links / size if size else 0.0
