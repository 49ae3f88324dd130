"""Every config that ships is one that the program takes, and says only what differs from the defaults."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_cht.config import parse
from llm_cht.models import configs_folder
from llm_cht.sweep.settings import load_sweep, plan
from llm_cht.train.config import RunSettings, check

SHIPPED = sorted(configs_folder().rglob("*.yaml"))
RECIPES = [path for path in SHIPPED if path.parent.name not in ("models", "sweeps")]
SWEEPS = [path for path in SHIPPED if path.parent.name == "sweeps"]


def same_as_default(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults[key], dict):
            yield from same_as_default(value, defaults[key], f"{prefix}{key}.")
        elif key in defaults and value == defaults[key]:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(configs_folder()).as_posix())
def test_recipe_is_taken_and_short(path: Path):
    settings = parse(RunSettings, "llm-cht train", [str(path)])
    check(settings)
    if settings.model.config.startswith("llama_"):
        assert (configs_folder() / "models" / f"{settings.model.config}.yaml").is_file()
    assert not list(same_as_default(yaml.safe_load(path.read_text()), dataclasses.asdict(RunSettings())))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_run_of_a_sweep_is_taken(path: Path, monkeypatch):
    monkeypatch.chdir(configs_folder().parent)  # the files name each other from the root of the repository
    monkeypatch.setenv("LLM_CHT_DATA", "data")
    runs = plan(load_sweep(str(path)), [])[1]
    assert len(runs) > 1
    assert len({run.name for run in runs}) == len(runs)
