"""Whole runs through the command line: what they leave behind, resume, signals, and the dense run's reference."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_cht.cli import main
from llm_cht.config import parse
from llm_cht.data.text import load_text
from llm_cht.models import build_model
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.train.config import RunSettings
from tests.helpers import command, finished, learned, records, tiny_config


def test_a_run_leaves_a_stock_model_a_report_and_its_records(tmp_path, capsys):
    config = tiny_config(tmp_path, method={"preset": "chtss"}, train={"steps": 24})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    out = capsys.readouterr().out
    assert "validation perplexity" in out
    assert f"llm-cht train {run}/config.yaml --resume auto" in out
    assert (run / "report.html").is_file()
    assert [r["step"] for r in records(run, "train")] == list(range(1, 25))
    assert [r["step"] for r in records(run, "topology")] == [3, 6, 9, 12, 15, 18]
    assert [r["step"] for r in records(run, "validation")] == [10, 20, 24, 24]  # of a part, then of all
    end = records(run, "end")[0]["summary"]
    topology = read_topology(run / "model")
    for name, mask in topology.masks.items():
        assert int(mask.sum()) == math.floor((1 - 0.8) * mask.numel() + 0.5), name
    assert all(count.links == count.nonzero for count in verify_folder(run / "model").values())
    densities = [r["density"] for r in records(run, "train")]
    assert end["average_density"] == pytest.approx(sum(densities_in_force(densities, run)) / 24)
    assert end["perplexity"] < 300


def densities_in_force(logged: list[float], run: Path) -> list[float]:
    """The density each step was computed at: a record shows the one after the update that follows its step."""
    first = 1 - sum(
        layer["sparsity"] * math.prod(layer["shape"]) for layer in records(run, "start")[0]["layers"].values()
    ) / sum(math.prod(layer["shape"]) for layer in records(run, "start")[0]["layers"].values())
    return [first, *logged[:-1]]


def test_stock_transformers_gives_the_validation_perplexity(tmp_path):
    config = tiny_config(tmp_path)
    assert main(["train", str(config)]) == 0
    settings = parse(RunSettings, "x", [str(config)])
    data = load_text(settings.data, settings.seed)
    torch.save([b["input_ids"] for b in data.validation.batches(4, None)], tmp_path / "batches.pt")
    code = f"""
import sys, torch, math
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "run" / "model")!r}).eval()
total = count = 0
with torch.no_grad():
    for ids in torch.load({str(tmp_path / "batches.pt")!r}):
        n = ids.shape[0] * (ids.shape[1] - 1)
        total += model(ids, labels=ids).loss.item() * n
        count += n
assert not any(name.startswith("llm_cht") for name in sys.modules)
print(math.exp(total / count))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    ours = records(tmp_path / "run", "end")[0]["summary"]["perplexity"]
    assert float(result.stdout) == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("accumulated", [False, True])
def test_the_dense_preset_equals_a_plain_loop_over_stock_transformers(tmp_path, accumulated):
    train = {"steps": 12, "micro_batch_size": 2 if accumulated else None}
    config = tiny_config(tmp_path, method={"preset": "dense", "sparsity": 0.0}, train=train)
    assert main(["train", str(config)]) == 0
    settings = parse(RunSettings, "x", [str(config)])

    # the reference: nothing of ours but the batches and the fresh model
    batches = load_text(settings.data, settings.seed).train
    model = build_model(settings.model, settings.seed).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.Adam([{"params": matrices}, {"params": others}], lr=3e-3, betas=(0.9, 0.999), fused=True)
    losses = []
    for step in range(1, 13):
        factor = step / 2 if step <= 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (12 - 2)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        ids = batches.batch((step - 1) * 4, 4)["input_ids"]
        parts = ids.split(2) if accumulated else [ids]
        loss = 0.0
        for part in parts:
            logits = model(part).logits[:, :-1].reshape(-1, 300)
            mean = torch.nn.functional.cross_entropy(logits, part[:, 1:].reshape(-1)) / len(parts)
            mean.backward()
            loss += mean.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)

    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    same = {name: torch.equal(value, saved[name]) for name, value in model.state_dict().items()}
    assert all(same.values()), [name for name, equal in same.items() if not equal]
    # the reported loss is a sum over tokens divided once, the reference a mean: the last bit may differ
    assert [r["loss"] for r in records(tmp_path / "run", "train")] == pytest.approx(losses, rel=1e-6)


def test_accumulation_is_exact_for_unequal_token_counts(tmp_path):
    losses = []
    for micro in (None, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        config = tiny_config(
            folder, data={"packing": "pad", "sequence_length": 64}, train={"steps": 8, "micro_batch_size": micro}
        )
        assert main(["train", str(config)]) == 0
        losses.append([r["loss"] for r in records(folder / "run", "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_an_unbroken_one(tmp_path, number):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sections = {"method": {"preset": "chtss"}, "train": {"steps": 60}, "checkpoint": {"every": None}}
    assert main(["train", str(tiny_config(tmp_path / "a", **sections))]) == 0
    process = command("train", tiny_config(tmp_path / "b", **sections))
    run = tmp_path / "b" / "run"
    wait_for_records(run, process, 7)
    process.send_signal(number)
    code, _, err = finished(process)
    assert code == 0, err
    assert f"resume with: llm-cht train {run}/config.yaml --resume auto" in err
    assert not (run / "model").exists()
    assert main(["train", str(run / "config.yaml"), "--resume", "auto"]) == 0
    assert learned(run) == learned(tmp_path / "a" / "run")


def wait_for_records(run: Path, process: subprocess.Popen, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < lines:
        assert process.poll() is None, finished(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    sections = {"method": {"preset": "chtss"}, "train": {"steps": 120}, "checkpoint": {"every": 3, "keep_last": 2}}
    assert main(["train", str(tiny_config(tmp_path / "a", **sections))]) == 0
    config, run = tiny_config(tmp_path / "b", **sections), tmp_path / "b" / "run"
    draw, kills = random.Random(1), 0
    while kills < 10:
        process = command("train", config, "--resume", "auto")
        # past the imports, which take seconds, so that the kills fall into steps, updates and saves
        wait_for_new_record(run, process)
        time.sleep(draw.uniform(0, 0.8))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        assert process.returncode in (0, -9)
        if process.returncode == 0:
            break
    assert kills == 10, "the run was too short for ten kills"
    assert main(["train", str(config), "--resume", "auto"]) == 0
    assert learned(run) == learned(tmp_path / "a" / "run")
    digests = {records(folder, "end")[0]["summary"]["mask_digest"] for folder in (run, tmp_path / "a" / "run")}
    assert len(digests) == 1


def wait_for_new_record(run: Path, process: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    deadline = time.monotonic() + 120
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_checkpoint_folder_or_a_run_folder_can_be_named(tmp_path):
    config = tiny_config(tmp_path)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    before = learned(run)
    assert main(["train", str(config), "--resume", str(run / "checkpoints" / "step-00000015")]) == 0
    assert learned(run) == before
    assert main(["train", str(config), "--resume", str(run)]) == 0
    assert learned(run) == before


def test_a_damaged_checkpoint_is_passed_over_and_the_user_told(tmp_path, capsys):
    config = tiny_config(tmp_path)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    before = learned(run)
    newest = run / "checkpoints" / "step-00000020" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    assert main(["train", str(config), "--resume", "auto"]) == 0
    err = capsys.readouterr().err
    assert "step-00000020" in err
    assert "resumed from" in err
    assert "step-00000015" in err
    assert learned(run) == before


def test_pure_bf16_holds_weights_and_moments_in_bf16(tmp_path):
    config = tiny_config(tmp_path, train={"precision": "pure_bf16", "steps": 6}, checkpoint={"every": 3})
    assert main(["train", str(config)]) == 0
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    assert {value.dtype for name, value in saved.items() if not name.endswith(".step")} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("extra", [{"activation_checkpointing": True}, {"precision": "bf16"}])
def test_other_ways_to_compute_train_too(tmp_path, extra):
    config = tiny_config(tmp_path, train={"steps": 6} | extra)
    assert main(["train", str(config)]) == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "end"


@pytest.mark.slow
def test_compile_trains_too(tmp_path):
    config = tiny_config(tmp_path, train={"steps": 6, "compile": True})
    assert main(["train", str(config)]) == 0
