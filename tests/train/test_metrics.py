import json
import sys
import time
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_cht.errors import UserError
from llm_cht.train import metrics
from llm_cht.train.metrics import Meter, MetricsLog, MetricsSettings, read_metrics

LAYERS = {"model.layers.0.q_proj": {"sparsity": 0.9, "itop": 0.1, "shape": [4, 8]}}


def write_steps(run, steps, settings=None):
    log = MetricsLog(run, settings or MetricsSettings())
    for step in steps:
        log.log("train", step, 100 * step, {"loss": 1.0 / step})
    return log


def steps_of(run):
    return [record["step"] for record in read_metrics(run / "metrics.jsonl")]


def test_a_record_stands_in_the_file_at_once_and_in_full(tmp_path):
    log = MetricsLog(tmp_path, MetricsSettings())
    log.log("topology", 100, 5000, {"anp": torch.tensor(0.5), "removed": 7, "layers": LAYERS})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")  # before close
    assert record.pop("seconds") >= 0
    assert record == {"kind": "topology", "step": 100, "tokens": 5000, "anp": 0.5, "removed": 7, "layers": LAYERS}
    log.close()


def test_non_finite_numbers_become_null(tmp_path):
    log = MetricsLog(tmp_path, MetricsSettings())
    log.log(
        "train", 1, 1, {"loss": float("nan"), "grad_norm": torch.tensor(float("inf")), "layers": {"a": {"x": -1e999}}}
    )
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["loss"], record["grad_norm"], record["layers"]["a"]["x"]) == (None, None, None)


def test_tensorboard_gets_the_scalars_and_the_layers(tmp_path):
    log = MetricsLog(tmp_path, MetricsSettings())
    log.log("train", 3, 30, {"loss": 2.5, "note": "text", "full": True})
    log.log("topology", 4, 40, {"removed": 7, "layers": LAYERS})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    layer = "layers/model.layers.0.q_proj"
    assert set(events.Tags()["scalars"]) == {"train/loss", "topology/removed", f"{layer}/sparsity", f"{layer}/itop"}
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 2.5)


def test_truncate_drops_later_records_and_the_torn_line_and_the_clock_goes_on(tmp_path):
    write_steps(tmp_path, [1, 2, 3]).close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"seconds": 1000.0})
    path.write_text("\n".join(lines) + '\n{"kind": "tra')
    log = MetricsLog(tmp_path, MetricsSettings())
    log.truncate_after(2)
    assert steps_of(tmp_path) == [1, 2]
    assert 1000 <= log.seconds < 1100
    log.log("train", 3, 300, {"loss": 9.0})
    log.close()
    assert steps_of(tmp_path) == [1, 2, 3]
    assert not list(tmp_path.glob("*.partial"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_truncate_takes_back_the_end_and_with_minus_one_everything(tmp_path):
    log = write_steps(tmp_path, [1, 2])
    log.log("validation", 1, 100, {"perplexity": 3.0})
    log.log("validation", 2, 200, {"perplexity": 3.0})
    log.log("end", 2, 200, {"perplexity": 3.0})
    log.close()
    log = MetricsLog(tmp_path, MetricsSettings())
    log.truncate_after(2)
    assert [record["kind"] for record in read_metrics(log.path)] == ["train", "train", "validation", "validation"]
    log.truncate_after(2, again=("end", "validation"))
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 1]
    log.truncate_after(1, again=("validation",))
    assert [record["kind"] for record in read_metrics(log.path)] == ["train"]
    log.truncate_after(-1)
    assert read_metrics(log.path) == []
    assert log.seconds < 100
    log.close()


def test_only_the_last_line_may_be_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1, "seconds": 0.5}\n{"kind": "st\xc3')
    assert len(read_metrics(path)) == 1
    path.write_text('{"kind": "tr\n{"kind": "train", "step": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_metrics(path)
    path.write_text('{"kind": "train", "step": 1, "seconds": 0.5}\n5\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no record of a run"):
        read_metrics(path)
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "other")


@pytest.mark.parametrize("settings", [MetricsSettings(every=0), MetricsSettings(peak_tflops=0.0)])
def test_impossible_settings_are_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"`metrics\.\w+` = 0"):
        MetricsLog(tmp_path, settings)
    assert not list(tmp_path.iterdir())


def test_missing_wandb_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install llm-cht\[wandb\]"):
        MetricsLog(tmp_path, MetricsSettings(wandb_project="p"))
    assert not list(tmp_path.iterdir())


def test_wandb_gets_the_scalars_and_a_resume_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Tracker:
        def define_metric(self, name, step_metric):
            calls.append((name, step_metric))

        def log(self, values):
            calls.append(values)

        def finish(self):
            calls.append("finish")

    ids = []
    fake = types.SimpleNamespace(init=lambda **arguments: ids.append(arguments["id"]) or Tracker())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = MetricsSettings(wandb_project="p")
    write_steps(tmp_path, [4], settings).close()
    MetricsLog(tmp_path, settings).close()
    assert calls[:3] == [("*", "step"), {"step": 4, "tokens": 400, "train/loss": 0.25}, "finish"]
    assert ids[0] == ids[1]


def test_meter_counts_the_interval_without_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"), peak_tflops=1.0, world_size=2)
    meter.add(600, 600e9)
    meter.add(400, 400e9)
    now[0] = 2.0
    with meter.paused():
        now[0] = 10.0
    first = meter.read()
    assert first["tokens_per_second"] == 500
    assert first["mfu"] == pytest.approx(500e9 / 2e12)
    meter.add(10, 1e9)
    now[0] = 11.0
    assert meter.read()["tokens_per_second"] == 10


def test_unknown_peak_leaves_mfu_out():
    meter = Meter(torch.device("cpu"), None, 1)
    meter.add(1, 1.0)
    assert set(meter.read()) == {"tokens_per_second", "peak_memory_mb"}


def test_resident_memory_is_in_megabytes():
    assert 50 < metrics.peak_memory_mb(torch.device("cpu")) < 100_000  # Python with torch: some hundred MB


def test_peaks_of_known_devices(monkeypatch):
    known = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.0,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "Some Other GPU": None,
    }
    for name, peak in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_tflops(torch.device("cuda"), MetricsSettings()) == peak
        assert metrics.peak_tflops(torch.device("cuda"), MetricsSettings(peak_tflops=5.0)) == 5.0
    assert metrics.peak_tflops(torch.device("cpu"), MetricsSettings()) is None
