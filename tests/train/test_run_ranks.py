"""Whole runs on many ranks through ``accelerate launch``: the run of one process, resumed by any number, exported."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_cht.config import parse
from llm_cht.data.text import load_text
from llm_cht.train.checkpoint import CheckpointStore
from llm_cht.train.config import RunSettings
from tests.helpers import command, finished, records, tiny_config
from tests.launched import free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def launch(engine: str, ranks: int, config: Path, *arguments: str | Path) -> None:
    """A run to its end, by the config that is shipped for ``engine``."""
    launch_script(engine, ranks, ROOT / "launch" / "train.py", config, *arguments)


def launch_script(engine: str, ranks: int, *command_line: str | Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
    launcher += ["--config_file", ROOT / "launch" / "accelerate" / f"{engine}.yaml", "--main_process_port", free_port()]
    if ranks == 1:
        launcher = [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [*map(str, launcher), *map(str, command_line)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]


def alone(config: Path, *arguments: str | Path) -> None:
    code, _, err = finished(command("train", config, *arguments))
    assert code == 0, err


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run, "train")]


def summary(run: Path) -> dict:
    return records(run, "end")[-1]["summary"]


def cut_back(run: Path, step: int) -> None:
    """Make a finished run one that was stopped after ``step``."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "model")


def stock_perplexity(folder: Path, config: Path) -> float:
    """Of the validation text, by an unmodified transformers model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for batch in load_text(parse(RunSettings, "test", [str(config)]).data, 0).validation.batches(8):
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(**batch).loss.item() * targets
        count += targets
    return math.exp(total / count)


def progress(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["progress"]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds for any number of ranks, whole."""
    checkpoint = CheckpointStore(run / "checkpoints", 1).load(run / "checkpoints" / f"step-{step:08d}")
    groups = ("model", "optimizer", "topology")
    return {f"{stem}/{name}": checkpoint.tensor(stem, name) for stem in groups for name in checkpoint.names(stem)}


def test_two_ranks_train_as_one_and_their_model_is_a_stock_one(tmp_path):
    config = tiny_config(tmp_path, train={"micro_batch_size": 1}, checkpoint={"keep_last": 9})
    alone(config, "--run", tmp_path / "one")
    launch("zero2", 2, config, "--run", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert summary(tmp_path / "two")["mask_digest"] == summary(tmp_path / "one")["mask_digest"]
    perplexity = stock_perplexity(tmp_path / "two" / "model", config)
    assert perplexity == pytest.approx(summary(tmp_path / "two")["perplexity"], rel=1e-5)

    # one process goes on where two stopped, and ends where they did
    cut_back(tmp_path / "two", 15)
    alone(tmp_path / "two" / "config.yaml", "--resume", "auto")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert summary(tmp_path / "two")["mask_digest"] == summary(tmp_path / "one")["mask_digest"]

    # the checkpoint of two ranks, exported without them
    out = tmp_path / "exported"
    code, told, err = finished(command("export", tmp_path / "two" / "checkpoints" / "step-00000015", out))
    assert code == 0, err
    assert str(out) in told
    assert json.loads((out / "topology.json").read_text())["step"] == 15


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "tolerance"), [("ddp", 1e-5), ("zero1", 1e-5), ("zero2", 1e-5), ("zero3", 1e-4)])
def test_every_engine_trains_as_one_process(tmp_path, engine, tolerance):
    config = tiny_config(tmp_path, train={"micro_batch_size": 1})
    alone(config, "--run", tmp_path / "one")
    launch(engine, 2, config, "--run", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert summary(tmp_path / "two")["mask_digest"] == summary(tmp_path / "one")["mask_digest"]
    perplexity = stock_perplexity(tmp_path / "two" / "model", config)
    assert perplexity == pytest.approx(summary(tmp_path / "two")["perplexity"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_four_to_two_to_one_to_two_ranks(tmp_path, engine):
    """What is loaded is bit for bit what was saved, and the run stays within 1 % of the unbroken one."""
    config = tiny_config(tmp_path, checkpoint={"keep_last": 99, "save_best": False, "every": 5})
    run = tmp_path / "run"
    launch(engine, 4, config, "--run", run)
    unbroken = losses(run)

    saved, digests = state(run, 10), set()
    source = tmp_path / "source"
    shutil.copytree(run, source)
    cut_back(source, 10)
    for turn, ranks in enumerate((2, 1, 2)):
        again = tmp_path / f"again-{turn}"
        script = (ROOT / "tests" / "train" / "resave.py", source, again)
        launch_script(engine, ranks, *script)
        loaded = state(again, 10)
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name], tensor), (ranks, name)
        assert progress(again, 10) == progress(run, 10)
        digests.add((again / "digest").read_text())
        shutil.rmtree(source / "checkpoints")
        shutil.copytree(again / "checkpoints", source / "checkpoints")
    assert len(digests) == 1

    for step, ranks in ((5, 2), (10, 1), (15, 2)):
        cut_back(run, step)
        resumed = (run / "config.yaml", "--resume", "auto")
        if ranks == 1:
            alone(*resumed)
        else:
            launch(engine, ranks, *resumed)
        assert losses(run) == pytest.approx(unbroken, rel=0.01)
