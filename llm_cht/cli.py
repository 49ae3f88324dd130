"""The command line: ``llm-cht train`` and what goes around it.

A ``UserError`` is printed without a traceback and ends with code 2; anything else is a defect and keeps its traceback.
The commands import what they need when they are called, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

import llm_cht
from llm_cht.errors import UserError, nearest

if TYPE_CHECKING:
    from llm_cht.train.loop import Outcome

_PATIENCE_S = 2.0

_CONVERT_HELP = (
    "Makes a checkpoint sparse, a sparse folder dense, or removes its inactive neurons; reads and writes a block at a "
    "time, never in place, and reads again what it wrote. `llm-cht train CONFIG.yaml --model.path FOLDER` goes on from "
    "the links that it wrote."
)

_HELP = """\
usage: llm-cht COMMAND ...

  llm-cht train CONFIG.yaml [--section.key value ...]     train a model (`llm-cht train --help` lists the settings)
  llm-cht prepare CONFIG.yaml [--section.key value ...]   build vocabulary and token cache, and say what is in them
  llm-cht report RUN                                      write RUN/report.html
  llm-cht sweep SWEEP.yaml [--section.key value ...]      make a grid of runs and compare them
  llm-cht export RUN FOLDER [--dtype bfloat16]            write the model of a run's (or one) checkpoint to a folder
  llm-cht convert SOURCE FOLDER --sparsity 0.9 ...        make a model sparse, dense again, or smaller (`--help`)
  llm-cht methods [PRESET]                                what can be trained: all methods, or what one preset decides

`llm-cht --version` prints the version.
A run is stopped by CTRL-C and goes on by `llm-cht train RUN/config.yaml --resume auto`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user, or 1 if a run of a sweep failed."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h"):
        print(_HELP)
        return 0
    if command == "--version":
        print(f"llm-cht {llm_cht.__version__}")
        return 0
    try:
        if command not in _COMMANDS:
            raise UserError(f"unknown command `{command}`; known: {', '.join(_COMMANDS)}")
        return _COMMANDS[command](rest) or 0
    except UserError as error:
        _print_once(error)
        return _refused()
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"llm-cht: error: {_memory_message(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read it has seen enough (`| head`)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at exit)
        return 141
    except KeyboardInterrupt:
        print("llm-cht: interrupted", file=sys.stderr)
        return 130


def _refused() -> int:
    """2. One of many ranks leaves at once: now and then threads of torch.distributed abort an interpreter's own end."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    return 2


def _print_once(error: UserError) -> None:
    """An error that all ranks of a launcher have is printed by the first."""
    if os.environ.get("RANK", "0") != "0":
        if error.everywhere:
            return
        time.sleep(_PATIENCE_S)  # most likely the first has it too, and its end ends this one
    print(f"llm-cht: error: {error}", file=sys.stderr, flush=True)


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch's error on CUDA is known by its name, so that torch need not be imported."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _memory_message(error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0] or "the system gives no more"
    return (
        f"out of memory ({reason}); lower `train.micro_batch_size`, or for translation `train.micro_batch_tokens` "
        "(they change nothing but memory and time), set `train.activation_checkpointing: true`, or take a smaller model"
    )


def _train(arguments: Sequence[str]) -> None:
    from llm_cht.config import parse, split_arguments
    from llm_cht.report.page import write_report
    from llm_cht.train.config import RunSettings
    from llm_cht.train.run import train

    settings = parse(RunSettings, "llm-cht train", arguments)
    if not split_arguments(arguments)[0]:
        raise UserError(
            "no config file is given; usage: llm-cht train CONFIG.yaml [--section.key value ...], "
            "e.g. llm-cht train configs/quickstart.yaml"
        )
    _no_bars_in_files()
    outcome = train(settings, say=_say)
    if outcome.stopped_by or os.environ.get("RANK", "0") != "0":
        return
    report = write_report(outcome.run)
    print(f"\n{_ending(outcome)}\nreport                 {report}\nresume                 {outcome.resume}")


def _no_bars_in_files() -> None:
    """Transformers' bars fill log files, where ours are silent."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _ending(outcome: Outcome) -> str:
    """What a run has reached, for a person."""
    end = outcome.summary
    lines = []
    for name, where in (("", "validation"), ("test_", "test")):
        if f"{name}bleu" in end:
            lines.append(
                f"{f'BLEU, {where}':<22} {end[f'{name}bleu']:.2f}   (lower-cased {end[f'{name}bleu_lowercased']:.2f}; "
                f"copying the source: {end[f'{name}copy_bleu']:.2f})"
            )
    if "bleu_signature" in end:
        lines.append(f"sacreBLEU              {end['bleu_signature']}")
    unigram = f"   (a unigram model: {end['unigram_perplexity']:.1f})" if "unigram_perplexity" in end else ""
    steps = ", ".join(map(str, end["model_of_steps"]))
    lines += [
        f"validation perplexity  {end['perplexity']:.2f}{unigram}",
        f"density                {end['density']:.3f} at the end, {end['average_density']:.3f} on average",
        f"FLOPs                  {end['flops']:.2e}, {end['flops_relative']:.3f} of the dense model's on these tokens",
        f"time                   {end['seconds']:.0f} s for {end['tokens']:,} tokens",
        f"model                  {outcome.run / 'model'}, of step {steps}",
    ]
    return "\n".join(lines)


def _prepare(arguments: Sequence[str]) -> None:
    from llm_cht.config import parse
    from llm_cht.train.config import RunSettings, on_checkpoint

    settings = on_checkpoint(parse(RunSettings, "llm-cht prepare", arguments))
    if settings.task == "translation":
        from llm_cht.data.pairs import describe
        from llm_cht.train.build import prepare_pairs
        from llm_cht.train.config import check

        check(settings)
        print(describe(prepare_pairs(settings)))
    else:
        from llm_cht.data.text import describe as describe_text
        from llm_cht.data.text import load_text

        print(describe_text(load_text(settings.data, settings.seed)))


def _report(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] in ("--help", "-h"):
        print("usage: llm-cht report RUN\n\nWrites RUN/report.html from what the folder of a run holds.")
        return
    from llm_cht.report.page import write_report

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("usage: llm-cht report RUN, where RUN is the folder of a run")
    print(write_report(Path(arguments[0])))


def _export(arguments: Sequence[str]) -> None:
    parser = _Parser("llm-cht export", description="Write the model of a checkpoint to a folder.")
    parser.add_argument("place", metavar="RUN", help="a run (its newest good checkpoint) or RUN/checkpoints/step-...")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what `from_pretrained` of transformers then loads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args(arguments)
    import torch

    from llm_cht.train.export import export

    _no_bars_in_files()
    checkpoint = export(options.place, options.folder, getattr(torch, options.dtype))
    print(f"{options.folder}: the model of {checkpoint}, in {options.dtype}")


def _convert(arguments: Sequence[str]) -> None:
    parser = _Parser("llm-cht convert", description=_CONVERT_HELP)
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face model: a local folder, or a name of the hub")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the new folder; it must not be there, or be empty")
    parser.add_argument("--sparsity", type=float, help="make it sparse: share of missing links, e.g. 0.9")
    parser.add_argument("--dense", action="store_true", help="write a sparse folder without its topology")
    parser.add_argument("--compact", action="store_true", help="write a sparse folder without its inactive neurons")
    parser.add_argument("--by", default="magnitude", help="magnitude, ri: the strongest; er, brf, bsw, bsf: drawn")
    parser.add_argument("--budget", default="uniform", help="links per layer: uniform, er, erk; global: by score")
    parser.add_argument("--percolate", action="store_true", help="remove links that pass no signal")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, and of ties")
    parser.add_argument("--include", nargs="+", metavar="REGEX", help="layers to make sparse (default: the family's)")
    parser.add_argument("--exclude", nargs="+", metavar="REGEX", default=[], help="layers to leave dense")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as each tensor is)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that came with SOURCE")
    parser.add_argument("--time", action="store_true", help="after --compact: load both models and time them")
    options = parser.parse_args(arguments)
    from llm_cht.convert.run import Request, convert

    print(convert(Request(**vars(options)), _say))
    print(f"{options.folder}: converted from {options.source}")


_SWEEP_HELP = """\
usage: llm-cht sweep SWEEP.yaml [--table] [--section.key value ...]

Makes the runs of SWEEP.yaml one after the other, then prints and writes FOLDER/table.md. The same command goes on after
a stop, repeats what failed and leaves alone what has finished. Settings on the command line hold for all runs; paths
are those of the working directory.

  --table    only the table of what has finished

SWEEP.yaml:
  base: [CONFIG.yaml, ...]      # config files of every run
  settings: {train.steps: 100}  # settings of every run
  folder: runs/NAME             # runs go to FOLDER/SETTING_seedK
  cases:                        # named settings; each is combined with the grid
    dense: {method.preset: dense, method.sparsity: 0, optimizer.lr: 1e-3}   # a key of the grid: not varied over it
    chts: {method.preset: chts}
  grid:                         # every combination
    method.sparsity: [0.7, 0.9]
  seeds: [0, 1, 2]
  skip: [{case: chts, method.sparsity: 0.7}]     # left out
  compare: case                 # factor whose values are compared (the cases; a key of the grid)
  reference: dense              # value that the others are tested against (the first)
  metric: perplexity            # figure of a run's summary (perplexity)
  higher: false                 # whether a higher one is better (false)"""


def _sweep(arguments: Sequence[str]) -> int:
    if any(word in ("--help", "-h") for word in arguments):
        print(_SWEEP_HELP)
        return 0
    from llm_cht.config import split_arguments
    from llm_cht.sweep.run import LOG, run_sweep
    from llm_cht.sweep.settings import load_sweep, plan
    from llm_cht.sweep.table import write_table

    files, overrides = split_arguments([word for word in arguments if word != "--table"])
    if len(files) != 1:
        raise UserError("give one sweep file; usage: llm-cht sweep SWEEP.yaml [--table] [--section.key value ...]")
    sweep, runs = plan(load_sweep(files[0]), overrides)
    if "--table" in arguments:
        print(write_table(sweep, runs))
        return 0
    outcome = run_sweep(sweep, runs, _say)
    if outcome.stopped_by:
        _say(f"{outcome.stopped_by}: the sweep is stopped; the same command goes on with it")
    elif len(outcome.failed) < len(runs):
        print(write_table(sweep, runs))
    if outcome.failed:
        _say(
            f"{len(outcome.failed)} of {len(runs)} runs failed: {', '.join(outcome.failed)}; each says why in its "
            f"{LOG}, in {sweep.folder}; the same command repeats them"
        )
    return 1 if outcome.failed else 0


def _methods(arguments: Sequence[str]) -> None:
    import yaml

    from llm_cht.topology.presets import PRESETS, overview, preset

    if not arguments:
        rows = overview()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(
            "\n`llm-cht methods PRESET` lists what it decides, `llm-cht train --help` every setting; any can be "
            "changed: --method.zeta 0.3\n000 is the paper of CHT (ICLR 2024), 002 that of CHTs and CHTss (NeurIPS 2025)"
        )
        return
    if arguments[0] in ("--help", "-h") or len(arguments) > 1:
        raise UserError("usage: llm-cht methods [PRESET]")
    name = arguments[0]
    if name not in PRESETS:
        raise UserError(f"unknown method `{name}`; {nearest(name, PRESETS)}")
    print(yaml.safe_dump({"method": {"preset": name, **PRESETS[name]}}, sort_keys=False), end="")
    other = {key: value for key, value in preset(name, "translation").items() if value != PRESETS[name][key]}
    if other:
        print(f"# task: translation has {', '.join(f'{key}: {value}' for key, value in other.items())}")


class _Parser(argparse.ArgumentParser):
    """Mistakes end like those of every other command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows how {self.prog} is called")


def _say(text: str) -> None:
    """A line that does not tear the progress bar."""
    tqdm.write(text, file=sys.stderr)


_COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train": _train,
    "prepare": _prepare,
    "report": _report,
    "export": _export,
    "convert": _convert,
    "sweep": _sweep,
    "methods": _methods,
}

if __name__ == "__main__":
    sys.exit(main())
