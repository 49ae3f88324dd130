"""Settings from YAML files and dotted overrides, into plain dataclasses; knows no component.

Precedence: dataclass defaults, then the files from left to right, then ``--section.key value``. Types, ``--help`` and
``--print_config`` come from jsonargparse, which reads the dataclasses and the docstrings under their fields. What it
lacks is done here: a positional config file, and unknown keys refused with the nearest known one. Rejected: OmegaConf
(no types without a second schema) and argparse alone (nested settings by hand).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from llm_cht.errors import UserError

Settings = TypeVar("Settings")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(root: type[Settings], program: str, arguments: Sequence[str]) -> Settings:
    """Settings of type ``root`` from ``CONFIG.yaml ... --section.key value ...``.

    Raises:
        UserError: a file that is not there or not YAML, an unknown key (with the nearest known one), a wrong type.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    files, overrides = _split(arguments)
    known = known_keys(root)
    for file in files:
        _check_keys(_flat_keys(_load_yaml(file)), known, place=file)
    _check_keys(_override_keys(overrides), known, place="the command line")
    parser = _parser(root, program)
    try:
        namespace = parser.instantiate(parser.parse_args([*(f"--config={file}" for file in files), *overrides]))
    except ArgumentError as error:
        raise UserError(_readable(str(error))) from error
    values = {field.name: namespace[field.name] for field in dataclasses.fields(root)}  # type: ignore[arg-type]
    return root(**values)


def dump(settings: Any) -> str:
    """The settings as YAML, every key written out."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True, width=120)


def known_keys(root: type) -> dict[str, bool]:
    """Dotted names of all settings below ``root`` -> whether free keys may follow (a dict setting)."""
    keys: dict[str, bool] = {}
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        kinds = _alternatives(hints[field.name])
        keys[field.name] = any(typing.get_origin(kind) is dict or kind is dict for kind in kinds)
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                keys |= {f"{field.name}.{name}": free for name, free in known_keys(kind).items()}
    return keys


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _parser(root: type, program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        exit_on_error=False,
        description="CONFIG.yaml files come first (later ones win), then overrides: --section.key value.",
        usage=f"{program} CONFIG.yaml [MORE.yaml ...] [--section.key value ...]",
    )
    parser.add_argument("--config", action="config", help="a settings file; the same as naming it first")
    parser.add_class_arguments(root, as_group=False)
    return parser


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The leading file names, and the rest with every ``--config FILE`` taken out."""
    rest = list(arguments)
    files = []
    while rest and not rest[0].startswith("-"):
        files.append(rest.pop(0))
    overrides = []
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            files.append(rest.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            overrides.append(word)
    return files, overrides


def _load_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config file {file}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} is not YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"config file {file} holds {type(values).__name__}, not `key: value` lines")
    return values or {}


def _flat_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            keys += _flat_keys(value, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _override_keys(overrides: Sequence[str]) -> list[str]:
    names = [word[2:].split("=", 1)[0].rstrip("+") for word in overrides if word.startswith("--")]
    return [name for name in names if name not in ("help", "print_config")]


def _check_keys(keys: Sequence[str], known: dict[str, bool], place: str) -> None:
    free = tuple(f"{name}." for name, open_ended in known.items() if open_ended)
    for key in keys:
        if key in known or key.startswith(free):
            continue
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
            last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)
        ]
        hint = f"did you mean `{near[0]}`?" if near else "`--help` lists the known keys"
        raise UserError(f"unknown key `{key}` in {place}; {hint}")


def _readable(message: str) -> str:
    """jsonargparse's message on one line, in the words of a person who wrote a YAML file."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    text = " ".join(lines).replace("Parser key", "setting").replace("typing.Literal", "one of ")
    return text.replace("<class '", "").replace("'>", "")
