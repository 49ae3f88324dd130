"""What the command lines of this folder share: mistakes as one sentence, the device, and a table that grows by rows."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.utils import logging

from llm_cht.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises ``UserError`` for arguments that cannot be."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message} (--help lists the options)")


def count(text: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that ``device`` reads."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )


def device(options: argparse.Namespace) -> str:
    """The device that was asked for; ``UserError`` if it is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device


def show(row: dict[str, Any], first_width: int, header: bool) -> None:
    """Print a row of a Markdown table, right under the header if it is the first."""
    widths = [max(5, first_width), *(max(11, len(name)) for name in list(row)[1:])]
    values = [f"{value:,.6g}" if isinstance(value, float) else str(value or "-") for value in row.values()]
    for cells in ([*row], ["-" * width for width in widths], values)[0 if header else 2 :]:
        print("|", " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]), "|", flush=True)


def write(path: Path, text: str, what: str) -> None:
    """Write a file; ``what`` begins the message if it cannot be, and so names the option."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(
            f"{what} {path}: cannot be written: {error.strerror}; the table above has the figures"
        ) from error


def run(program: str, work: Callable[[], None]) -> int:
    """The exit code of a program: 0, 2 for a mistake of the user, 130 for CTRL-C."""
    logging.disable_progress_bar()  # of transformers, while it loads weights
    logging.set_verbosity_error()  # its report of missing weights; they are an error here
    warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # Marian's tokenizer, each time it is made
    try:
        work()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0
