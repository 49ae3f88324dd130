"""Which weights become the model of a language model's run, and whose figures the summary has."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from llm_cht.cli import main
from llm_cht.sparse.folder import verify_folder
from tests.helpers import records, tiny_config


@pytest.mark.parametrize("kind", ["best", "average"])
def test_the_perplexity_is_that_of_the_exported_model(tmp_path, kind):
    checkpoint = {"export": kind, "average": 2, "keep_last": 8, "every": 5}
    validation, rate = {"every": 5, "max_tokens": None}, {"lr": 0.01}
    if kind == "best":  # the last step is not: the learning rate climbs beyond reason
        rate, validation = {"lr": 30.0}, validation | {"every": 2}
    config = tiny_config(
        tmp_path,
        checkpoint=checkpoint,
        validation=validation,
        optimizer=rate,
        lr={"warmup_steps": 29},
        train={"steps": 30},
    )
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    end = records(run, "end")[0]["summary"]
    losses = {r["step"]: r["loss"] for r in records(run, "validation")}
    if kind == "best":
        assert end["model_of_steps"] == [min(losses, key=losses.__getitem__)] != [30]
        assert end["perplexity"] == pytest.approx(math.exp(losses[end["model_of_steps"][0]]), rel=1e-5)
    else:
        assert end["model_of_steps"] == [25, 30]
        assert end["perplexity"] != pytest.approx(math.exp(losses[30]), rel=1e-5)
    verify_folder(run / "model")


def test_an_average_is_of_regular_checkpoints_only(tmp_path):
    """Neither what a signal saved at an odd step nor what was the best there."""
    checkpoint = {"export": "average", "average": 3, "keep_last": 9, "every": 10}
    config = tiny_config(
        tmp_path, checkpoint=checkpoint, validation={"every": 7}, train={"steps": 30}, method={"preset": "static"}
    )
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    saved = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}
    assert saved - {10, 20, 30}, "no checkpoint at an odd step: the test shows nothing"
    assert records(run, "end")[0]["summary"]["model_of_steps"] == [10, 20, 30]
    parts = [load_file(run / "checkpoints" / f"step-{s:08d}" / "model.safetensors") for s in (10, 20, 30)]
    for name, value in load_file(run / "model" / "model.safetensors").items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-8)


def test_the_last_step_competes_by_the_tokens_that_the_others_were_measured_on(tmp_path):
    """A loss on everything is another figure than one on a part."""
    config = tiny_config(tmp_path, validation={"every": 5, "max_tokens": 128}, train={"steps": 20})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    parts = [r["loss"] for r in records(run, "validation") if not r["full"]]
    everything = [r["loss"] for r in records(run, "validation") if r["full"]]
    assert len(parts) == 4
    assert len(everything) == 1
    state = json.loads((run / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert state["progress"]["best"] == min(parts)
    assert records(run, "end")[0]["summary"]["perplexity"] == pytest.approx(math.exp(everything[0]), rel=1e-9)
