"""Settings from YAML files and dotted overrides, into plain dataclasses; knows no component.

Precedence: dataclass defaults, then the files from left to right, then ``--section.key value``. Types, ``--help`` and
``--print_config`` come from jsonargparse, which reads the dataclasses and the docstrings under their fields. What it
lacks is done here: a positional config file, and unknown keys refused with the nearest known one. Rejected: OmegaConf
(no types without a second schema) and argparse alone (nested settings by hand).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from yaml.error import MarkedYAMLError

from llm_cht.errors import UserError

Settings = TypeVar("Settings")

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_WORDS = {
    "Parser key": "setting",
    "a typing.Literal": "one of ",
    "typing.Literal": "",
    "NoneType": "null",
    "<class '": "",
    "'>": "",
    "unrecognized arguments": "unrecognized arguments (config files come before settings)",
}
"""words of jsonargparse -> words of a person who wrote a YAML file"""


def parse(root: type[Settings], program: str, arguments: Sequence[str]) -> Settings:
    """Settings of type ``root`` from ``CONFIG.yaml ... --section.key value ...``.

    Raises:
        UserError: a file that is not there or not YAML, an unknown key (with the nearest known one), a wrong type.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    files, overrides = split_arguments(arguments)
    known = known_keys(root)
    for file in files:
        values = flat(load_yaml(file))
        check_keys(values, known, place=file)
        check_sections(values, known, place=file)
        _check_empty(values, _hints(root), place=file)
    given = override_values(overrides)
    check_keys(given, known, place="the command line")
    check_sections(given, known, place="the command line")
    parser = _parser(root, program)
    chosen = [f"--config={file}" for file in files]
    try:
        namespace = parser.instantiate(parser.parse_args([*chosen, *overrides]))
    except ArgumentError as error:
        raise UserError(_place_of_error(parser, files) + _readable(str(error))) from error
    return root(**{field.name: namespace[field.name] for field in dataclasses.fields(root)})  # type: ignore[arg-type]


def dump(settings: Any) -> str:
    """The settings as YAML, every key written out."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of ``node``, whose keys differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise MarkedYAMLError(problem=f"the key `{key.value}` stands twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is not there, not YAML, or no mapping.
    """
    try:
        with Path(file).open(encoding="utf-8") as stream:
            values = yaml.load(stream, _Loader)
    except OSError as error:
        raise UserError(f"config file {file}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} is not YAML: {' '.join(str(error).split())}; correct it") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {file} holds {type(values).__name__}, not `key: value` lines; write some")
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def known_keys(root: type) -> dict[str, bool]:
    """Dotted names of all settings below ``root`` -> whether free keys may follow (a dict setting)."""
    return {
        name: any(typing.get_origin(kind) is dict or kind is dict for kind in kinds)
        for name, kinds in _hints(root).items()
    }


def _hints(root: type) -> dict[str, tuple[Any, ...]]:
    """Dotted names of all settings below ``root`` -> the types that each may have."""
    kinds_of: dict[str, tuple[Any, ...]] = {}
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        kinds_of[field.name] = _alternatives(hints[field.name])
        for kind in kinds_of[field.name]:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                kinds_of |= {f"{field.name}.{name}": kinds for name, kinds in _hints(kind).items()}
    return kinds_of


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
    sections = _sections(known_keys(root))
    for action in parser._actions:
        if action.dest in sections:
            action.help = argparse.SUPPRESS  # jsonargparse takes a file there too; one way to name files is enough
    return parser


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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


def override_values(overrides: Sequence[str]) -> dict[str, str]:
    """``--section.key value`` and ``--section.key=value`` words by key; values are the text given."""
    values = {}
    for word, following in itertools.pairwise([*overrides, ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values[name.rstrip("+")] = value if equals else following
    return {name: value for name, value in values.items() if name not in ("help", "print_config")}


def check_keys(keys: Iterable[str], known: dict[str, bool], place: str) -> None:
    """Refuse a dotted name that is not in ``known`` (see ``known_keys``), naming the nearest one."""
    free = tuple(f"{name}." for name, open_ended in known.items() if open_ended)
    for key in keys:
        if key in known or key.startswith(free):
            continue
        leaves = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
        word = key.rpartition(".")[2]
        namesakes = [name for name in leaves if name.rpartition(".")[2] == word]
        last = {name.rpartition(".")[2]: name for name in leaves}
        near = difflib.get_close_matches(key, namesakes, n=1, cutoff=0) or difflib.get_close_matches(key, leaves, n=1)
        near = near or [last[name] for name in difflib.get_close_matches(word, last, n=1)]
        hint = f"did you mean `{near[0]}`?" if near else "`--help` lists the known keys"
        raise UserError(f"unknown key `{key}` in {place}; {hint}")


def _sections(known: Iterable[str]) -> set[str]:
    return {key.rpartition(".")[0] for key in known}


def check_sections(values: Mapping[str, Any], known: dict[str, bool], place: str) -> None:
    """Refuse a value where a section of settings must stand."""
    sections = _sections(known)
    for key, value in values.items():
        if key in sections and value != {}:
            inside = next(name for name in known if name.startswith(f"{key}."))
            raise UserError(
                f"`{key}` = {value!r} in {place}: it is a section; write settings below it, e.g. `{inside}`"
            )


def _check_empty(values: dict[str, Any], kinds_of: dict[str, tuple[Any, ...]], place: str) -> None:
    """jsonargparse takes a null in a file for any type."""
    for key, value in values.items():
        if value is None and key in kinds_of and types.NoneType not in kinds_of[key]:
            raise UserError(f"`{key}` is null or empty in {place}; give it a value, or leave the line out")


def _place_of_error(parser: ArgumentParser, files: Sequence[str]) -> str:
    """The first file that does not parse by itself; nothing if the command line is at fault."""
    for file in files:
        try:
            parser.parse_args([f"--config={file}"])
        except ArgumentError:
            return f"{file}: "
    return ""


def _readable(message: str) -> str:
    """jsonargparse's message on one line."""
    text = " ".join(line.strip(" -") for line in message.splitlines())
    text = re.sub(
        r"Does not validate.*Subtypes: \[(.*)\] Errors:.*Given value: ", r"Expected one of \1. Got value: ", text
    )
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    choice = re.search(r"Expected one of \[(.*)\].*Got value: (\S+)$", text)
    if choice:
        near = difflib.get_close_matches(choice[2], re.findall(r"'([^']*)'", choice[1]), n=1)
        text += f"; did you mean `{near[0]}`?" if near else ""
    return text
