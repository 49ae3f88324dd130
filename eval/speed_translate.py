"""What token-sorted batches gain in translation, and what masks cost in training a translator.

    python eval/speed.py translate                                       # an untrained model of 2 M parameters
    python eval/speed.py translate --model FOLDER --source FILE          # beam search of a trained one on real lines

Beam search: the same model, settings and sentences, once in batches sorted by tokens and once batch by batch in file
order with as many sentences a batch on average; speed-ups are medians over repetitions that take turns. Tokens are
those of the hypotheses. An untrained model never says the end token, so that every hypothesis is as long as its limit
(``max_ratio * source + max_extra``) and the last row of a batch to end is the one with the longest source; a trained
one's hypotheses follow its sources more loosely, hence ``--model``.

Training: a whole step (forward, backward, clipping, Adam) of a Marian model on one batch of ``--train_tokens`` tokens,
masked over dense, in turns. Without ``--model`` sentences are random tokens, their lengths log-normal as the BPE tokens
of Multi30k (mean 15, standard deviation 5), or those of the lines of ``--source`` in words.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianConfig, MarianMTModel

from eval.speed import DENSITY, alternate, compare, processor
from llm_cht import __version__
from llm_cht.data.readers import read_documents
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.train.decode import DecodeSettings, Translator
from llm_cht.train.engine import EngineSettings, Precision, start_engine
from llm_cht.train.optim import OptimizerSettings, build_optimizer

END, PAD, VOCABULARY = 0, 1, 4000
SIZES = {
    "2m": {"d_model": 128, "layers": 3, "heads": 4, "ffn_dim": 512},
    "multi30k": {"d_model": 512, "layers": 6, "heads": 8, "ffn_dim": 1024},  # as 002
}


class Numbers:
    """A tokenizer whose text is the numbers of its tokens."""

    def __call__(self, texts: Iterable[str]) -> dict[str, list[list[int]]]:
        """As tokenizers of transformers: texts -> input_ids, with an end token."""
        return {"input_ids": [[*map(int, text.split()), END] for text in texts]}

    def decode(self, tokens: Iterable[int], **options: Any) -> str:
        """The text of tokens."""
        return " ".join(map(str, tokens))


def untrained(size: str) -> MarianMTModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": SIZES[size]["d_model"]}
    for name in ("layers", "ffn_dim"):
        sizes |= {f"{side}_{name}": SIZES[size][name] for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": SIZES[size]["heads"] for side in ("encoder", "decoder")}
    special: dict[str, Any] = {"eos_token_id": END, "pad_token_id": PAD, "decoder_start_token_id": PAD}
    config = MarianConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **sizes, **special)
    model = MarianMTModel(config)
    model.final_logits_bias[0, END] = -1e4  # never: what an untrained one says is chance otherwise
    return model


def made_up(lengths: Iterable[int]) -> list[str]:
    draw = random.Random(0)
    return [" ".join(str(draw.randrange(2, VOCABULARY)) for _ in range(length)) for length in lengths]


def drawn_lengths(number: int) -> list[int]:
    draw = random.Random(1)
    return [min(80, max(2, round(draw.lognormvariate(2.65, 0.33)))) for _ in range(number)]


def search_table(model: Any, tokenizer: Any, sources: Sequence[str], arguments: argparse.Namespace) -> None:
    settings = DecodeSettings(beams=arguments.beams, batch_tokens=arguments.batch_tokens)
    orders: tuple[Literal["file", "sorted"], ...] = ("file", "sorted")
    found: dict[str, list[str]] = {}

    def run(order: Literal["file", "sorted"]) -> None:
        found[order] = Translator(model, tokenizer, settings, order)(sources)

    model.eval()
    seconds = alternate({order: partial(run, order) for order in orders}, arguments.repetitions)
    print("\n| beam search, order | s | sentences/s | tokens/s | speed-up |\n| --- | --- | --- | --- | --- |")
    for order, times in seconds.items():
        tokens = sum(map(len, tokenizer(found[order])["input_ids"]))
        speed_up = statistics.median(a / b for a, b in zip(seconds["file"], times, strict=True))
        own = statistics.median(times)
        print(f"| {order} | {own:.2f} | {len(sources) / own:.1f} | {tokens / own:.0f} | {speed_up:.2f} |", flush=True)
    equal = sum(a == b for a, b in zip(found["file"], found["sorted"], strict=True))
    print(f"\n{equal} of {len(sources)} hypotheses are the same in both.")


def train_table(arguments: argparse.Namespace) -> None:
    print("\n| what | variant | ms | ratio |\n| --- | --- | --- | --- |")
    lengths = sorted(drawn_lengths(1000))
    length = lengths[len(lengths) // 2]
    sentences = max(1, arguments.train_tokens // (2 * length))
    batch = torch.randint(2, VOCABULARY, (2, sentences, length))
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        engine = start_engine(EngineSettings("cpu", precision, sentences, None, 1.0, 600.0, False))
        variants: dict[str, Callable[[], object]] = {}
        for name in ("dense", "masked"):
            model = untrained(arguments.size).train()
            model.final_logits_bias.zero_()
            if name == "masked":
                for number, layer in enumerate(sparsify(model, SparseSettings()).layers.values()):
                    generator = torch.Generator().manual_seed(number)
                    layer.set_mask(torch.rand(layer.mask.shape, generator=generator) < DENSITY)
            optimizer = build_optimizer(model, OptimizerSettings())
            variants[name] = partial(_step, engine.autocast, model, optimizer, batch)
        what = f"step of {sentences} pairs of {length} + {length} tokens, {arguments.size}, {precision}"
        compare(what, variants, arguments.repetitions)


def _step(autocast: Any, model: Any, optimizer: torch.optim.Optimizer, batch_2BL: Tensor) -> None:
    with autocast():
        loss = model(input_ids=batch_2BL[0], labels=batch_2BL[1], use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="speed.py translate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = DecodeSettings()
    parser.add_argument("--model", help="a trained folder; needs --source")
    parser.add_argument("--source", type=Path, help="a file, one sentence a line (plain, .gz, .xz)")
    parser.add_argument("--sentences", type=int, default=500, help="of the search (default: 500)")
    parser.add_argument("--beams", type=int, default=default.beams)
    parser.add_argument("--batch_tokens", type=int, default=default.batch_tokens, help="beams x padded source")
    parser.add_argument("--size", choices=SIZES, default="2m", help="of the untrained model (default: 2m)")
    parser.add_argument("--train_tokens", type=int, default=2048, help="both sides of a batch (default: 2048)")
    parser.add_argument("--repetitions", type=int, default=5, help="of every variant (default: 5)")
    arguments = parser.parse_args(given)
    if arguments.model and not arguments.source:
        parser.error("--model needs --source: real lines for its tokenizer")
    versions = f"llm_cht {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; {versions}")
    print(f"`eval/speed.py translate {' '.join(given)}`: medians of {arguments.repetitions} alternated repetitions")
    lines = list(read_documents(arguments.source, "", "line"))[: arguments.sentences] if arguments.source else []
    if arguments.model:
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(arguments.model)
        search_table(model, AutoTokenizer.from_pretrained(arguments.model), lines, arguments)
    else:
        lengths = [len(line.split()) for line in lines] or drawn_lengths(arguments.sentences)
        search_table(untrained(arguments.size), Numbers(), made_up(lengths), arguments)
    train_table(arguments)
