"""What a launcher may ask for that cannot work: one clear error with the remedy, and exit code 2.

Most happen in a forked rank with the environment that the launcher would set; torch and DeepSpeed are imported.
"""

import importlib.util
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401  (each fork would import it anew)
import pytest
import torch
from accelerate.state import AcceleratorState

from llm_cht.cli import main
from tests.helpers import tiny_config, told
from tests.launched import by_hand, free_port

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return tiny_config(tmp_path_factory.mktemp("config"))


def fork(arguments: list[str], err: Path, prepare: Callable[[], None]) -> int:
    """Process id of the command line in a fork, after ``prepare()`` there."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout, sys.stderr = io.StringIO(), err.open("w", buffering=1)
        AcceleratorState._reset_state(reset_partial_state=True)  # runs of other tests in this process
        prepare()
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def refused(
    config: Path,
    parts: tuple[str, ...],
    *arguments: str,
    environment: dict[str, str],
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """The only rank, launched with this environment, ends with 2 and one message with ``parts``; nothing is written."""

    def prepared() -> None:
        launched = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        os.environ.update(launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | environment)
        prepare()

    err = config.parent / "err"
    code = os.waitstatus_to_exitcode(os.waitpid(fork(["train", str(config), *arguments], err, prepared), 0)[1])
    told(code, err.read_text(), *parts)
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, ("asks for FSDP", "use DDP or DeepSpeed's ZeRO (launch/accelerate/)")),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ("asks for model parallelism", "use DDP or DeepSpeed's ZeRO")),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ("asks for model parallelism", "use DDP or DeepSpeed's ZeRO")),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ("4 gradient accumulation steps", "`train.micro_batch_size`", "take gradient_accumulation_steps out"),
        ),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ("zero_stage 0", "launch/accelerate/ddp.yaml")),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            ("`offload_param` is not supported", "offload_optimizer: cpu"),
        ),
    ],
)
def test_a_launcher_that_asks_for_what_cannot_work(config, environment, parts):
    refused(config, parts, environment=environment)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--train.precision", "pure_bf16"), ("`train.precision` = pure_bf16", "under ZeRO use bf16 or fp32")),
        (("--train.on_nonfinite", "skip"), ("`train.on_nonfinite` = skip", "use stop under ZeRO")),
    ],
)
def test_settings_that_cannot_work_under_zero(config, arguments, parts):
    refused(config, parts, *arguments, environment=ZERO)


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            ("`round_robin_gradients`", "take it out"),
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("`zero_quantized_weights`", "take it")),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ("`zero_hpz_partition_size`", "remove it")),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, ("has `optimizer`", "take it out")),
    ],
)
def test_a_deepspeed_config_that_cannot_work(config, tmp_path, section, parts):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1} | section))
    environment = ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "ACCELERATE_CONFIG_DS_FIELDS": ""}
    refused(config, parts, environment=environment)


def test_ranks_of_which_accelerate_sees_one(config):
    def alone() -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    parts = ("2 ranks were launched, torch.distributed has 1, accelerate 1", "Launch with launch/accelerate/*.yaml")
    refused(config, parts, environment={"WORLD_SIZE": "2"}, prepare=alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--train.batch_size", "5"), ("`train.batch_size` = 5 does not divide among 2 ranks", "change one of them")),
        (
            ("--train.micro_batch_size", "4"),
            ("`train.micro_batch_size` = 4 does not divide the 2 sequences that each of 2 ranks", "change one of them"),
        ),
    ],
)
def test_batch_sizes_that_do_not_divide(config, arguments, parts):
    with by_hand([[config, *arguments]] * 2) as started:
        codes, (first, second) = started.ends(100)
    assert codes == [2, 2], (first, second)
    told(2, first, *parts)
    assert not (config.parent / "run").exists()


def test_deepspeed_that_is_not_installed(config):
    def lose() -> None:
        importlib.util.find_spec = lambda name, *_: None if name == "deepspeed" else real(name, *_)

    real = importlib.util.find_spec
    refused(
        config,
        ("DeepSpeed, which is not installed", "pip install 'llm-cht[deepspeed]'"),
        environment=ZERO,
        prepare=lose,
    )
