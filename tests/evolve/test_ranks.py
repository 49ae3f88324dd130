"""The updater on many ranks under every engine, really launched: the same masks as on one process, zeros everywhere."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.launched import free_port

SCRIPT = Path(__file__).parent / "ranks.py"
PRESETS = ("chts", "chtss", "set", "rigl")
TASKS = ("updates", "train", "broken", "disagree")

pytestmark = pytest.mark.timeout(900)  # DeepSpeed compiles an operator the first time a machine uses it


def launched(engine: str, ranks: int, tasks: tuple[str, ...], precision: str = "fp32") -> dict:
    """What the ranks found out; ``engine`` is one, ddp, or zero1 to zero3."""
    folder = Path(mkdtemp())
    out = folder / "told.json"
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--machine_rank", "0"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_processes", str(ranks), "--main_process_port", free_port()]
    if engine.startswith("zero"):
        config = folder / "deepspeed.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": int(engine[-1])}}))
        launcher += ["--use_deepspeed", "--deepspeed_config_file", str(config)]
    else:
        launcher += ["--multi_gpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PRECISION": precision}
    command = [sys.executable, *(launcher if engine != "one" else []), str(SCRIPT), str(out), *tasks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(out.read_text())
    assert told["engine"] == {"one": "one process", "ddp": "ddp"}.get(engine, f"zero-{engine[-1]}")
    return told


@cache
def alone(precision: str = "fp32") -> dict:
    return launched("one", 1, ("updates", "train"), precision)["ranks"][0]


def check_updates(told: dict, precision: str) -> None:
    for rank in told["ranks"]:
        for case, expected in alone(precision)["updates"].items():
            assert rank["updates"][case]["digests"] == expected["digests"], case
            assert len(set(rank["updates"][case]["digests"])) == 10
        assert rank["updates"]["chts"]["figures"]["percolated"] > 0


@pytest.mark.parametrize(
    "engine",
    ["ddp", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow), "zero3"],
)
def test_two_ranks_find_the_masks_of_one_process(engine):
    told = launched(engine, 2, TASKS)
    check_updates(told, "fp32")
    for rank in told["ranks"]:
        for preset in PRESETS:
            one, many = alone()["train"][preset], rank["train"][preset]
            assert many["losses"] == pytest.approx(one["losses"], rel=1e-4 if engine == "zero3" else 1e-6)
            assert many["digests"] == one["digests"], preset
        assert ["exp_avg" in rank["broken"][0], "master" in rank["broken"][1]] == [True, True], rank["broken"]
        message = rank["disagree"]
        assert "topology update of step 2" in message
        assert "`model.layers.1.mlp.up_proj` on rank(s) [1]" in message


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("ddp", 2), ("ddp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2", 4), ("zero3", 4)],
)
def test_any_number_of_ranks_finds_the_masks_of_one_process(engine, ranks, precision):
    told = launched(engine, ranks, ("updates",) if ranks != 2 else ("updates", "train"), precision)
    check_updates(told, precision)
