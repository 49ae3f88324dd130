"""BLEU of any Hugging Face encoder-decoder, sparse or not, on two line-aligned files.

    python eval/bleu.py MODEL [MODEL ...] --source FILE --reference FILE [--output FOLDER] ...
    python eval/bleu.py --hypotheses FILE [FILE ...] --source FILE --reference FILE

Each MODEL is a folder or a hub name that stock ``AutoModelForSeq2SeqLM`` and ``AutoTokenizer`` load, and becomes a row
of one Markdown table; the last row is the source, copied. Files are UTF-8, plain, ``.gz`` or ``.xz``.

- Beam search is transformers' own, over batches of sources sorted by tokens (``llm_cht/train/decode.py`` says why no
  hypothesis depends on its batch). ``--order file`` keeps the order of the file, to compare.
- bleu is sacreBLEU's (13a, mixed case), lowercased the same on lower-cased text; the signatures stand below the table.
  length_ratio is tokens of hypotheses over those of references, brevity_penalty what BLEU was multiplied with for it.
- sentences_per_s is the time of all sentences from text to text, without loading the model; nothing else is measured in
  it, so that a first batch that warms up counts too.
- sparsity is the share of missing links in the layers that ``topology.json`` lists, once the weights are checked to be
  0 there; "-" where there is no such file.
- ``--output`` writes the hypotheses, one a line, before they are scored, the references beside them, and prints the
  ``sacrebleu`` command that gives the same figures. A line break inside a hypothesis becomes a space.
- Two rows or more are compared with the first by sacreBLEU's own paired bootstrap: mean and 95 % interval of BLEU over
  the resamples, and the p-value of the difference.
- ``--dtype`` is that of weights and activations.

Rejected: the ``evaluate`` package (wraps the same sacreBLEU, and hides its signature).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its neighbours however llm_cht is installed

from eval import command_line, models
from llm_cht.data.readers import read_documents
from llm_cht.errors import UserError
from llm_cht.train.bleu import Bleu, bleu, copy_baseline
from llm_cht.train.decode import DecodeSettings, translate

WHAT = "an encoder-decoder model"


def read_lines(option: str, path: Path) -> list[str]:
    """The lines of a file, without their ends."""
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file (looked from {Path.cwd()}); correct the path")
    return list(read_documents(path, "", "line"))


def hypotheses_of(name: str, sources: Sequence[str], options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """One line a source by model ``name``, and the columns of its row that are not scores.

    Raises:
        UserError: model or tokenizer cannot be loaded, do not fit each other, or a source is too long for the model.
    """
    sparsity = models.sparsity(Path(name))
    tokenizer = models.load(AutoTokenizer, name, WHAT)
    model = models.load_model(AutoModelForSeq2SeqLM, name, WHAT, options.dtype)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(f"{name}: not all of its weights are finite; they are damaged, or its training diverged")
    texts = [source for source in sources if source.strip()]
    largest = max((max(tokens) for tokens in tokenizer(texts)["input_ids"]), default=0) if texts else 0
    models.check_vocabulary(name, largest, model.get_input_embeddings().num_embeddings)
    settings = DecodeSettings(options.beams, options.length_penalty, batch_tokens=options.batch_tokens)
    start = time.perf_counter()
    try:
        hypotheses = translate(model.to(options.device), tokenizer, sources, settings, order=options.order)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    seconds = time.perf_counter() - start
    lines = [" ".join(hypothesis.splitlines()) for hypothesis in hypotheses]
    return lines, {"sparsity": sparsity, "sentences_per_s": len(sources) / seconds}


def row_of(name: str, found: Bleu, about: dict[str, Any]) -> dict[str, Any]:
    """A row of the table as column -> value."""
    return {
        "model": name,
        "bleu": found.score,
        "lowercased": found.lowercased,
        "length_ratio": found.length_ratio,
        "brevity_penalty": found.brevity_penalty,
        "sparsity": about.get("sparsity"),
        "sentences_per_s": about.get("sentences_per_s"),
    }


def compare(
    systems: list[tuple[str, Sequence[str]]], references: list[str], resamples: int, seed: int
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the paired bootstrap against the first of ``systems`` (name, hypotheses), and its signature."""
    os.environ["SACREBLEU_SEED"] = str(seed)  # the one way to tell it
    test = PairedTest(systems, {"BLEU": BLEU(force=True)}, [references], test_type="bs", n_samples=resamples)
    signatures, found = test()
    results: list[Any] = list(found["BLEU"])
    rows = [
        {"model": name, "bleu": result.score, "mean": result.mean, "95 %": f"+- {result.ci:.4g}", "p": result.p_value}
        for (name, _), result in zip(systems, results, strict=True)
    ]
    return rows, f"BLEU|{signatures['BLEU']}"


# ---- command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code: 0, or 2 for a mistake of the user."""
    return command_line.run("bleu.py", lambda: _tabulate(arguments))


def _tabulate(arguments: Sequence[str] | None) -> None:
    options = _options(arguments)
    sources, references = _pairs(options)
    names: list[str] = options.models or list(map(str, options.hypotheses))
    given = {str(path): _hypotheses(path, references, options) for path in options.hypotheses or ()}
    for name in options.models:
        models.find(name, "seq2seq")
    files = _files(options)
    if files:
        _write_lines(files["references"], references)
    copied, copy_name = copy_baseline(sources, references), "copy of the source"
    width = max(map(len, [*names, copy_name]))
    rows: list[dict[str, Any]] = []
    systems: list[tuple[str, Sequence[str]]] = []
    for name in names:
        lines, about = (given[name], {}) if name in given else hypotheses_of(name, sources, options)
        if files:
            _write_lines(files[name], lines)
        systems.append((name, lines))
        rows.append(row_of(name, bleu(lines, references), about))
        command_line.show(rows[-1], width, header=len(rows) == 1)
    rows.append(row_of(copy_name, copied, {}))
    command_line.show(rows[-1], width, header=False)
    report: dict[str, Any] = {"rows": rows, "signatures": [copied.signature, copied.lowercased_signature]}
    print(f"\nbleu: {copied.signature}\nlowercased: {copied.lowercased_signature}", flush=True)
    if len(systems) > 1:
        report["bootstrap"], report["bootstrap_signature"] = compare(
            systems, references, options.bootstrap, options.seed
        )
        print(f"\nPaired bootstrap of {options.bootstrap} resamples, against the first:\n")
        for number, row in enumerate(report["bootstrap"]):
            command_line.show(row, width, header=number == 0)
        print(f"\n{report['bootstrap_signature']}")
    if files:
        _say_commands(files, options)
    if options.json:
        command_line.write(options.json, json.dumps(report, indent=1) + "\n", "--json")


def _pairs(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    sources = read_lines("--source", options.source)
    references = read_lines("--reference", options.reference)
    _check_numbers({f"--source {options.source}": sources, f"--reference {options.reference}": references})
    sources, references = sources[: options.max_lines], references[: options.max_lines]
    for number, reference in enumerate(references, 1):
        if not reference.strip():
            raise UserError(
                f"{options.reference}:{number}: the reference is empty; fill it in, or leave the line out of both files"
            )
    return sources, references


def _hypotheses(path: Path, references: list[str], options: argparse.Namespace) -> list[str]:
    lines = read_lines("--hypotheses", path)
    if options.max_lines is None or len(lines) < len(references):
        _check_numbers({f"--hypotheses {path}": lines, f"--reference {options.reference}": references})
    return lines[: options.max_lines]


def _check_numbers(of_file: dict[str, list[str]]) -> None:
    (first, ours), (second, theirs) = of_file.items()
    if len(ours) != len(theirs):
        raise UserError(
            f"{first} has {len(ours)} lines, {second} {len(theirs)}: line n of one must belong to line n of the other"
        )


def _files(options: argparse.Namespace) -> dict[str, Path]:
    """Where the hypotheses of each model go, and the references; nothing without --output."""
    if options.output is None or options.hypotheses:
        return {}
    files = {"references": options.output / "references.txt"}
    for name in options.models:
        path = options.output / (re.sub(r"\W+", "_", name).strip("_") + ".txt")
        if path in files.values():
            raise UserError(
                f"MODEL {name}: {path} is already for another one; give every model once, and a name of its own"
            )
        files[name] = path
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be made: {error.strerror}; give another folder") from error
    return files


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    command_line.write(path, "".join(f"{line}\n" for line in lines), "--output")


def _say_commands(files: dict[str, Path], options: argparse.Namespace) -> None:
    references, *hypotheses = (shlex.quote(str(path)) for path in files.values())
    print("\nThe same by sacreBLEU itself:\n")
    for path in hypotheses:
        print(f"sacrebleu {references} -i {path} -m bleu -w 4  # lower-cased: with -lc")
    if len(hypotheses) > 1:
        systems, resamples = " ".join(hypotheses), options.bootstrap
        print(
            f"SACREBLEU_SEED={options.seed} sacrebleu {references} -i {systems} -m bleu -w 4 --paired-bs "
            f"--paired-bs-n {resamples}"
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(prog="bleu.py", description="BLEU of Hugging Face encoder-decoders on aligned files.")
    add, default = parser.add_argument, DecodeSettings()
    add("models", nargs="*", metavar="MODEL", help="a model folder (RUN/model), or a name on the hub")
    add("--source", type=Path, required=True, help="one sentence a line (plain, .gz, .xz)")
    add("--reference", type=Path, required=True, help="their translations, line by line")
    add("--hypotheses", type=Path, nargs="+", help="score these files instead of models")
    add("--output", type=Path, help="folder for the hypotheses (MODEL.txt) and the references")
    add("--beams", type=command_line.count, default=default.beams, help="(%(default)s)")
    add("--length_penalty", type=float, default=default.length_penalty, help="(%(default)s)")
    add(
        "--batch_tokens",
        type=command_line.count,
        default=default.batch_tokens,
        help="source tokens x beams (%(default)s)",
    )
    add("--order", choices=("sorted", "file"), default="sorted", help="what shares a batch (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(%(default)s)")
    command_line.add_device(parser)
    add("--max_lines", type=command_line.count, help="only the first lines")
    add(
        "--bootstrap", type=command_line.count, default=1000, help="resamples, where systems are compared (%(default)s)"
    )
    add("--seed", type=command_line.count, default=12345, help="of the bootstrap (%(default)s, as sacreBLEU's)")
    add("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if bool(options.models) == bool(options.hypotheses):
        raise UserError("give models to translate with, or files with --hypotheses, and not both")
    options.device = command_line.device(options)
    return options


if __name__ == "__main__":
    sys.exit(main())
