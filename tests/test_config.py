"""Settings: precedence, types, unknown keys with the nearest known one, and what a dump gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from llm_cht.config import dump, known_keys, parse
from llm_cht.errors import UserError


@dataclass
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    places: str | list[str] = "here"
    extra: dict[str, int | float | str | None] = field(default_factory=dict)


@dataclass
class Root:
    seed: int = 0
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


def test_defaults_then_files_then_command_line(write):
    first = write("seed: 1\ninner: {rate: 0.2, kind: b}\n")
    second = write("inner: {rate: 0.3}\n", "d.yaml")
    assert parse(Root, "x", []) == Root()
    assert parse(Root, "x", [first]).inner == Inner(0.2, "b")
    assert parse(Root, "x", [first, second, "--seed", "7"]) == Root(7, None, Inner(0.3, "b"))
    assert parse(Root, "x", ["--config", first, "--inner.rate=1e-3"]).inner == Inner(1e-3, "b")


def test_types_of_overrides(write):
    assert parse(Root, "x", ["--inner.places", "[p, q]"]).inner.places == ["p", "q"]
    assert parse(Root, "x", ["--inner.extra.width", "3"]).inner.extra == {"width": 3}
    assert parse(Root, "x", [write("limit: 5\n"), "--limit", "null"]).limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {rat: 1}", "unknown key `inner.rat` in .*; did you mean `inner.rate`"),
        ("rate: 1", "unknown key `rate` in .*; did you mean `inner.rate`"),
        ("zzz: 1", "unknown key `zzz`.*--help"),
        ("seed: one", "seed.*int.*one"),
        ("inner: {kind: c}", r"inner\.kind.*'a', 'b'.*c"),
        ("seed: one", r"c\.yaml: setting .seed"),
        ("seed:", r"`seed` is null or empty in .*c\.yaml; give it a value"),
        ("inner: {rate: null}", r"`inner.rate` is null or empty in .*c\.yaml"),
        ("inner: {places: ~}", "`inner.places` is null or empty"),
        ("inner: {extra: null}", "`inner.extra` is null or empty"),
        ("- 1", "holds list"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_names_place_and_remedy(write, text, message):
    with pytest.raises(UserError, match=message) as error:
        parse(Root, "x", [write(text)])
    assert "\n" not in str(error.value) or "YAML" in message


def test_wrong_command_line():
    with pytest.raises(UserError, match=r"unknown key `inner.kond` in the command line; did you mean `inner.kind`"):
        parse(Root, "x", ["--inner.kond", "b"])
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        parse(Root, "x", ["nowhere.yaml"])
    with pytest.raises(UserError, match="expected one argument"):
        parse(Root, "x", ["--seed"])


def test_a_type_error_names_the_file_it_is_in(write):
    good, bad = write("seed: 1\n"), write("seed: x\n", "bad.yaml")
    with pytest.raises(UserError, match=rf"^{bad}: setting .seed.*x$"):
        parse(Root, "x", [good, bad, "--seed", "3"])
    with pytest.raises(UserError, match=r"^setting .seed.*y$"):
        parse(Root, "x", [good, "--seed", "y"])


@pytest.mark.parametrize("words", [["--inner", "0.1"], ["--inner=0.1"]])
def test_a_section_on_the_command_line_is_no_setting(words):
    with pytest.raises(UserError, match=r"`inner` = '0.1' in the command line: it is a section.* e.g. `inner.rate`"):
        parse(Root, "x", words)


def test_null_where_it_may_stand(write):
    assert parse(Root, "x", [write("limit: null\ninner: {extra: {k: null}}\n")]).inner.extra == {"k": None}


def test_help_lists_settings_and_no_sections(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Root, "x", ["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--inner.rate" in out
    assert "--inner " not in out


def test_dump_reads_back(write):
    settings = Root(3, None, Inner(0.25, "b", ["p"], {"k": None}))
    assert parse(Root, "x", [write(dump(settings))]) == settings


def test_known_keys_knows_nested_and_free_ones():
    keys = known_keys(Root)
    assert "inner.rate" in keys
    assert keys["inner.extra"]
    assert not keys["seed"]


def test_print_config(capsys, write):
    with pytest.raises(SystemExit) as end:
        parse(Root, "x", [write("seed: 4\n"), "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 4
