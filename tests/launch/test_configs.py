"""The shipped accelerate configs: accelerate reads every key, and the run's own settings reach the engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.launched import free_port

FOLDER = Path(__file__).parents[2] / "launch" / "accelerate"
SETTLED = Path(__file__).with_name("settled.py")
STAGES = {"ddp": None, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "nodes": 2}


def test_every_config_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_accelerate_reads_every_key(name):
    read = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys it does not know
    stage = (read.deepspeed_config or {}).get("zero_stage")
    assert stage == STAGES[name]
    assert read.distributed_type == ("MULTI_GPU" if stage is None else "DEEPSPEED")
    # what the run decides is not there, and accelerate's own mixed precision is off
    assert read.mixed_precision in (None, "no")
    decided = {"gradient_accumulation_steps", "gradient_clipping", "offload_param_device", "deepspeed_config_file"}
    assert not decided & set(read.deepspeed_config or {})
    if read.num_machines > 1:
        assert read.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_settings_of_the_run_reach_the_engine(name, tmp_path):
    options = ["--config_file", FOLDER / f"{name}.yaml", "--num_machines", "1", "--num_processes", "2"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", free_port()]
    ended = subprocess.run([*launcher, SETTLED, tmp_path], capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr
    told = json.loads((tmp_path / "settled.json").read_text())
    stage = STAGES[name]
    assert (told.pop("engine"), told.pop("ranks")) == ("ddp" if stage is None else f"zero-{stage}", 2)
    if stage is not None:
        assert told == {
            "stage": stage,
            "micro": 2,
            "batch": 8,
            "passes": 2,
            "clip": 0.5,
            "precision": "torch.bfloat16",
            "offload": name == "zero2_offload",
            "optimizer": "AdamW",
        }
