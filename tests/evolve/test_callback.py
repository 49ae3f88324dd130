"""The Trainer of transformers with sparse training: the script as users start it, killed, resumed, on many ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from llm_cht import TopologyCallback, sparsify
from llm_cht.sparse.folder import read_topology, verify_folder
from tests.evolve.trainer_parts import arguments, fresh, off_the_masks, rows
from tests.launched import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "hf_trainer.py"
OPTIONS = ["--max_steps", "60", "--save_steps", "20", "--logging_steps", "10", "--use_cpu", "true"]
OPTIONS += ["--report_to", "none", "--learning_rate", "3e-3", "--sequence_length", "32", "--update_interval", "5"]
OPTIONS += ["--sparsity", "0.8", "--disable_tqdm", "true"]

pytestmark = pytest.mark.timeout(600)


def started(folder: Path, *more: str, engine: str | None = None) -> subprocess.Popen:
    text = folder.parent / "text.txt"
    text.write_text("\n\n".join(f"document {n} has the words {n * n} and {n % 7} in it" for n in range(400)))
    command = [sys.executable]
    if engine:
        command += ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", free_port()]
        command += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{engine}.yaml")]
    batch = ["--per_device_train_batch_size", "2" if engine else "4"]
    batch += ["--ddp_backend", "gloo"] if engine else []
    line = [*command, str(SCRIPT), "--output_dir", str(folder), "--source", str(text), *OPTIONS, *batch, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-4000:]
    return out


def model(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(folder / "model" / "model.safetensors"), read_topology(folder / "model").masks


def same(first: Path, second: Path) -> None:
    (weights, masks), (other_weights, other_masks) = model(first), model(second)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert all(torch.equal(masks[name], other_masks[name]) for name in masks)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer") / "whole"
    out = ended(started(folder))
    assert "after 9 updates" in out  # steps 5 to 45 of 60
    return folder


def test_the_model_is_a_stock_one_with_its_topology(unbroken):
    for folder in (unbroken / "model", unbroken / "checkpoint-40"):
        counts = verify_folder(folder)
        masks = read_topology(folder).masks
        assert set(counts) == set(masks)
        assert len(masks) == 28
        assert all(int(mask.sum()) == int(0.2 * mask.numel() + 0.5) for mask in masks.values())
    assert read_topology(unbroken / "checkpoint-40").step == 40
    AutoModelForCausalLM.from_pretrained(unbroken / "model")(torch.arange(8)[None])


def test_killed_and_resumed_equals_unbroken(unbroken, tmp_path):
    folder = tmp_path / "broken"
    process = started(folder)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint-40" / "topology.json").exists():
        assert process.poll() is None or process.returncode == 0, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for name in ("checkpoint-60", "model"):  # where the kill came late
        subprocess.run(["rm", "-rf", folder / name], check=True)
    refused = started(folder)
    out, _ = refused.communicate(timeout=200)
    assert refused.returncode == 2
    assert re.search(r"checkpoint-40 is of an earlier training.*--resume_from_checkpoint true", out)
    ended(started(folder, "--resume_from_checkpoint", str(folder / "checkpoint-40")))
    same(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_ranks_under_accelerate_launch(unbroken, tmp_path, engine):
    ended(started(tmp_path / "two", engine=engine))
    verify_folder(tmp_path / "two" / "model")
    masks, alone = model(tmp_path / "two")[1], model(unbroken)[1]
    agreement = [float((masks[name] == alone[name]).float().mean()) for name in masks]
    assert min(agreement) > 0.75  # same batches, sums in another order: some choices part
    before = model(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-60")
    ended(started(tmp_path / "two", "--resume_from_checkpoint", "true", engine=engine))
    after = model(tmp_path / "two")
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


class Rates(TopologyCallback):
    """Notes the rate of each step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.__dict__.setdefault("seen", []).append(kwargs["optimizer"].param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_learning_rate_climbs_back_after_an_update_and_the_schedule_does_not_notice(tmp_path, schedule):
    model = fresh()
    callback = Rates(sparsify(model, {"preset": "set", "sparsity": 0.5, "update_interval": 4}), rewarm_steps=2)
    settings = arguments(tmp_path, learning_rate=0.1, lr_scheduler_type=schedule)
    Trainer(model, settings, train_dataset=rows(), callbacks=[callback]).train()
    plain = [0.1 * (1 - step / 12 if schedule == "linear" else 1) for step in range(12)]
    factors = [1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1, 1]  # updates after steps 4 and 8 (end_step 9)
    assert callback.seen == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)])
    assert [figures["step"] for figures in callback.figures] == [4, 8]


@pytest.mark.parametrize("preset", ["rigl", "mest", "granet", "chtss"])
def test_methods_that_look_at_gradients_with_accumulation(tmp_path, preset):
    model = fresh()
    topology = sparsify(model, {"preset": preset, "sparsity": 0.6, "update_interval": 4})
    settings = arguments(tmp_path, gradient_accumulation_steps=2)
    Trainer(model, settings, train_dataset=rows(), callbacks=[TopologyCallback(topology)]).train()
    assert topology.density == pytest.approx(0.4, abs=0.01)
    assert off_the_masks(topology) == 0
