"""Perplexity of any Hugging Face causal language model, sparse or not, on any text.

    python eval/perplexity.py MODEL [MODEL ...] --data builtin|FILES|HUB_NAME [--sequence_length L] [--stride S] ...

Each MODEL is a folder or a hub name that stock ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, and becomes a row
of one Markdown table. What is measured:

- The text is every document of the data that is not blank, as training reads them: encoded by the model's own
  tokenizer, an end token after each, joined into one line of n tokens in the order of the data.
- Window k = 0, 1, ... reads tokens kS .. kS + L - 1 (the last window: what is left) and predicts the successor of each.
  Only what no earlier window predicted counts: every token after the first is predicted exactly once, from at least
  L - S + 1 tokens where so many stand before it, and from all of them where fewer do.
- With S = L the windows are the sequences of training's validation, which drops the last one if it is not full and
  does not predict the first token of each. The default S = L / 2 gives every token at least half a
  window of context at the price of two passes over the text; S = 1 takes L passes.
- ``loss`` is the sum of -ln p over the n - 1 predicted tokens, end tokens included, added in float64 whatever the
  dtype of the model. perplexity = exp(loss / tokens), where tokens = n - 1; per word = exp(loss / words), where words
  are runs of characters without white space; bits/byte = loss / ln 2 / bytes, the UTF-8 bytes of the documents.
  The last two can be compared across tokenizers, the first cannot.
- ``--validation_fraction`` keeps the documents that a run with that setting did not train on; the default keeps all.
- ``--max_tokens`` ends the text before the document that would exceed it, so that words and bytes stay exact. What it
  keeps depends on the tokenizer: rows with different bytes saw different texts.
- sparsity is the share of missing links in the layers that ``topology.json`` lists, once the weights are checked to be
  0 there; "-" where there is no such file.
- ``--dtype`` is that of weights and activations; bfloat16 rounds the weights too, which training in bf16 does not.

L defaults to the sequence length that training defaults to, not to the positions that a model allows: a model has never
seen positions beyond its training sequences. Rejected: the ``evaluate`` package (one text a sequence, no stride).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its neighbours however llm_cht is installed

from eval import command_line, models
from llm_cht.data.hub import hub_source, reach
from llm_cht.data.pack import IGNORED
from llm_cht.data.readers import Rule
from llm_cht.data.settings import DataSettings
from llm_cht.data.sources import Source, builtin, is_local, local_files
from llm_cht.data.split import Split
from llm_cht.data.tokenizer import encode
from llm_cht.errors import UserError

WHAT = "a causal language model"


def evaluate(name: str, documents: Iterable[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the model ``name`` on ``documents``: the row of the table as column -> value.

    Raises:
        UserError: model or tokenizer cannot be loaded, or does not fit the other, the text or the options.
    """
    sparsity = models.sparsity(Path(name))
    tokenizer = models.load(AutoTokenizer, name, WHAT)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end token, which separates documents; give it an `eos_token`")
    model = models.load_model(AutoModelForCausalLM, name, WHAT, options.dtype)
    length, stride = _windows(name, model, options)
    shown = tqdm(documents, desc=f"read for {name}", unit=" documents", dynamic_ncols=True, disable=None)
    tokens, words, num_bytes = _read(shown, tokenizer, options.max_tokens)
    models.check_vocabulary(name, int(tokens.max()), model.get_input_embeddings().num_embeddings)
    loss = summed_loss(model.to(options.device), tokens, length, stride, options.batch_size)
    if not math.isfinite(loss):
        raise UserError(f"{name}: its loss is not finite; if `--dtype float32` does not help, its weights are damaged")
    num_tokens = len(tokens) - 1
    return {
        "model": name,
        "perplexity": _exp(loss / num_tokens),
        "word_perplexity": _exp(loss / words),
        "bits_per_byte": loss / math.log(2) / num_bytes,
        "tokens": num_tokens,
        "words": words,
        "bytes": num_bytes,
        "sparsity": sparsity,
        "sequence_length": length,
        "stride": stride,
        "dtype": options.dtype,
    }


@torch.inference_mode()
def summed_loss(model: PreTrainedModel, tokens: Tensor, length: int, stride: int, batch_size: int) -> float:
    """Sum of -ln p in nats over all tokens (n,) but the first, each predicted once in windows as defined above."""
    inputs, targets = tokens[:-1], tokens[1:]
    num_windows = max(0, math.ceil((len(inputs) - length) / stride)) + 1
    missing = (num_windows - 1) * stride + length - len(inputs)  # filled on the right, where no real token sees it
    inputs_KL = F.pad(inputs, (0, missing)).unfold(0, length, stride)
    targets_KL = F.pad(targets, (0, missing), value=IGNORED).unfold(0, length, stride)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with tqdm(total=num_windows, desc="evaluate", unit=" windows", dynamic_ncols=True, disable=None) as bar:
        for first in range(0, num_windows, batch_size):
            labels_BL = targets_KL[first : first + batch_size].clone()
            labels_BL[int(first == 0) :, : length - stride] = IGNORED
            inputs_BL = inputs_KL[first : first + batch_size].to(model.device)
            logits_BLV = model(input_ids=inputs_BL, use_cache=False).logits
            for logits_LV, labels_L in zip(logits_BLV, labels_BL.to(model.device), strict=True):
                wide_LV = logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32))  # one window at a time
                losses_L = F.cross_entropy(wide_LV, labels_L, ignore_index=IGNORED, reduction="none")
                total += losses_L.sum(dtype=torch.float64)
            bar.update(len(labels_BL))
    return total.item()


def _windows(name: str, model: PreTrainedModel, options: argparse.Namespace) -> tuple[int, int]:
    """Length and stride in tokens."""
    positions: float = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    length = options.sequence_length or int(min(DataSettings.sequence_length, positions))
    stride = options.stride or max(1, length // 2)
    if length > positions:
        raise UserError(f"--sequence_length {length}: {name} has {positions} positions; give at most that")
    if stride > length:
        raise UserError(f"--stride {stride}: would skip tokens between windows of {length}; give at most that")
    return length, stride


def _read(documents: Iterable[str], tokenizer: Any, max_tokens: int | None) -> tuple[Tensor, int, int]:
    """Tokens (n,) int64, words and bytes of the first documents, all or those of at most ``max_tokens`` together."""
    line: list[Tensor] = []
    count = words = num_bytes = 0
    for text in documents:
        tokens = torch.from_numpy(encode(tokenizer, [text])[0])
        if max_tokens is not None and count + len(tokens) > max_tokens:
            if not line:
                raise UserError(f"--max_tokens {max_tokens}: the first document has {len(tokens)}; give at least that")
            break
        line.append(tokens)
        count += len(tokens)
        words += len(text.split())
        num_bytes += len(text.encode())
    if count < 2:
        raise UserError("--data: no document with text; give files that have some")
    return torch.cat(line), words, num_bytes


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


# ---- command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, each row as soon as it is known; returns the exit code: 0, or 2 for a mistake of the user."""
    return command_line.run("perplexity.py", lambda: _tabulate(arguments))


def _tabulate(arguments: Sequence[str] | None) -> None:
    options = _options(arguments)
    split = Split(_source(options), None, options.validation_fraction, None)
    for name in options.models:
        models.find(name, "causal")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        documents = (text for side, text in split.source_documents() if side == "validation")
        rows.append(evaluate(name, documents, options))
        command_line.show(rows[-1], max(map(len, options.models)), header=len(rows) == 1)
    if options.json:
        command_line.write(options.json, json.dumps(rows, indent=1) + "\n", "--json")


def _source(options: argparse.Namespace) -> Source:
    names = options.data
    if names == ["builtin"]:
        return builtin()
    if len(names) > 1 or is_local(names[0]):
        return local_files("--data", names, options.text_field, options.text_documents)
    reach(names[0], "data set", "--data")
    return hub_source(names[0], options.subset, options.split, options.text_field, streaming=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="perplexity.py", description="Perplexity of Hugging Face causal language models on a text."
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a model folder (RUN/model), or a name on the hub")
    add("--data", nargs="+", required=True, help="`builtin` (Python's library), files, folders, globs, a hub data set")
    add("--split", default="test", help="of a hub data set (%(default)s)")
    add("--subset", help="configuration of a hub data set")
    add("--text_field", default="text", help="of JSON lines, parquet and hub data sets (%(default)s)")
    add("--text_documents", choices=get_args(Rule), help="what is a document of a text file (see data.text_documents)")
    add("--validation_fraction", type=float, default=1.0, help="only what data.validation_fraction holds out of a run")
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="(%(default)s)")
    add("--sequence_length", type=command_line.count, help=f"tokens of a window ({DataSettings.sequence_length})")
    add("--stride", type=command_line.count, help="tokens from one window to the next (half a window)")
    add("--batch_size", type=command_line.count, default=8, help="windows at once (%(default)s)")
    command_line.add_device(parser)
    add("--max_tokens", type=command_line.count, help="only the first documents, of at most so many tokens together")
    add("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if not 0 < options.validation_fraction <= 1:
        raise UserError(f"--validation_fraction {options.validation_fraction}: give a fraction above 0, at most 1")
    options.device = command_line.device(options)
    return options


if __name__ == "__main__":
    sys.exit(main())
