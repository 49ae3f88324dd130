"""Every config that ships is one that the program takes, and says only what differs from the defaults."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_cht.config import parse
from llm_cht.models import configs_folder
from llm_cht.train.config import RunSettings, check

RECIPES = [path for path in sorted(configs_folder().rglob("*.yaml")) if path.parent.name != "models"]


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
