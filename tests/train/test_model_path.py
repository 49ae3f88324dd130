"""What a run takes over from `model.path`: tokenizer, links and weights, each unless it is set otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_cht.cli import main
from llm_cht.sparse.folder import read_topology
from tests.helpers import command, finished, tiny_config, told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run with another vocabulary than a new one would train."""
    place = tmp_path_factory.mktemp("first")
    assert main(["train", str(tiny_config(place, data={"vocab_size": 290}, method={"preset": "set"}))]) == 0
    return place / "run" / "model"


def run_on(folder: Path, place: Path, *more: str) -> Path:
    path = ["--model.path", str(folder), "--model.overrides", "{}"]
    assert main(["train", str(tiny_config(place, train={"steps": 4})), *path, "--data.vocab_size", "300", *more]) == 0
    return place / "run"


def test_tokenizer_and_links_are_those_of_the_folder(folder, tmp_path, capsys):
    run = run_on(folder, tmp_path)
    for file in ("tokenizer.json", "model/tokenizer.json"):
        home = run / "tokenizer" if "/" not in file else run
        assert (
            json.loads((home / file).read_text())["model"]
            == json.loads((folder / "tokenizer.json").read_text())["model"]
        )
    first, given = read_topology(run, "topology_start").masks, read_topology(folder).masks
    assert all(torch.equal(first[name], given[name]) for name in given)
    assert f"note: the first links are those of {folder}" in capsys.readouterr().err


def test_a_preset_with_first_weights_of_its_own_keeps_those_of_the_folder(folder, tmp_path):
    """`cht` would draw them."""
    run = run_on(folder, tmp_path, "--method.preset", "cht", "--optimizer.lr", "1e-12")
    weights, given = (load_file(place / "model.safetensors") for place in (run / "model", folder))
    for name, mask in read_topology(folder).masks.items():
        kept = mask & read_topology(run / "model").masks[name]
        torch.testing.assert_close(weights[f"{name}.weight"][kept], given[f"{name}.weight"][kept])


def test_links_drawn_over_trained_weights_are_told(folder, tmp_path, capsys):
    run_on(folder, tmp_path, "--method.initial", "er")
    assert "`method.initial: er` draws the first links whatever the weights" in capsys.readouterr().err


def test_a_folder_without_tokenizer_is_refused(folder, tmp_path, capsys):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code = main(["train", str(tiny_config(tmp_path)), "--model.path", str(bare), "--model.overrides", "{}"])
    told(code, capsys.readouterr().err, f"`model.path` = '{bare}'", "no tokenizer there", "`data.tokenizer`")
    assert not (tmp_path / "run").exists()


def test_code_of_a_model_is_never_run(folder, tmp_path):
    """Not even where somebody answers transformers' question with yes."""
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "mine.py").write_text("raise SystemExit('this must not run')\n")
    path = ["--model.path", str(own), "--model.overrides", "{}"]
    process = command("train", tiny_config(tmp_path), *path)
    code, _, err = finished(process)
    told(code, err, f"`model.path` = '{own}'", "Python code of its own", "`llm_cht.sparsify`")
    assert "y/N" not in err


def test_the_folder_of_a_dense_run_has_no_links_to_go_on_with(tmp_path, capsys):
    config = tiny_config(tmp_path, method={"preset": "dense", "sparsity": 0.0})
    assert main(["train", str(config)]) == 0
    (tmp_path / "on").mkdir()
    run_on(tmp_path / "run" / "model", tmp_path / "on", "--method.preset", "set")
    assert "draws the first links whatever the weights of `model.path` are" in capsys.readouterr().err


def test_a_falling_density_on_a_sparse_folder_is_told_what_to_do(folder, tmp_path, capsys):
    more = ["--model.path", str(folder), "--model.overrides", "{}", "--method.preset", "gmp"]
    code = main(["train", str(tiny_config(tmp_path)), *more])
    told(code, capsys.readouterr().err, "`method.preset: gmp`", "its density begins at 0.5", "`method.initial`")


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_folder_that_is_not_there(tmp_path, capsys, command):
    code = main([command, str(tiny_config(tmp_path)), "--model.path", "./nope"])
    told(code, capsys.readouterr().err, "`model.path` = './nope'", "no folder here")
