"""What a run writes down while it goes: ``metrics.jsonl``, TensorBoard, W&B on request; and its speed and memory.

The JSONL file is the record of a run: one object a line, flushed at once, strict JSON (a non-finite number becomes
``null``), so that the report and any script can read it during the run or after a kill. TensorBoard and W&B are views
of the same numbers. A database was rejected (no text tools), and so were ``accelerate``'s trackers: they take flat
scalars only and know nothing of taking records back when a run resumes from an earlier step.
"""

import json
import math
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llm_cht.errors import UserError
from llm_cht.files import disk_errors, write_whole

FILE_NAME = "metrics.jsonl"
_KEPT = "The checkpoints are untouched."

# Dense bf16 peaks in TFLOP/s, from the data sheets; the first name contained in the device's name counts.
PEAK_TFLOPS = {
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True)
class MetricsSettings:
    """What is written down, how often, and where besides the run folder."""

    every: int = 10
    """Optimizer steps between two training records."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for MFU. Unset: taken from a table of common GPUs, or MFU is left out."""
    wandb_project: str | None = None
    """Weights & Biases project that also gets the metrics (pip install llm-cht[wandb])."""

    def check(self) -> None:
        """Raise ``UserError`` for values that cannot work, or when W&B is asked for and not installed."""
        if self.every < 1:
            raise UserError(f"`metrics.every` = {self.every}: must be at least 1 optimizer step; raise it")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise UserError(
                f"`metrics.peak_tflops` = {self.peak_tflops}: must be above 0 TFLOP/s; raise it or leave it out"
            )
        if self.wandb_project is not None:
            _import_wandb(self.wandb_project)


class MetricsLog:
    """The records of one run. Made by the main process only; call ``close`` at the end.

    All records of a step must be logged before the checkpoint of that step is saved: a resume keeps what the
    checkpoint's step has written and repeats nothing of it.
    """

    def __init__(self, run: Path, settings: MetricsSettings, config: Mapping[str, Any] | None = None) -> None:
        """Open the log of the folder ``run``; ``config`` (the resolved settings) is only shown in W&B."""
        settings.check()
        self.path = run / FILE_NAME
        with disk_errors(self.path, 0, _KEPT):
            self._file = self.path.open("a", encoding="utf-8")
        self._started = time.monotonic()
        self._purge_step: int | None = None
        self._wandb = None if settings.wandb_project is None else _start_wandb(run, settings.wandb_project, config)

    @property
    def seconds(self) -> float:
        """Seconds since the run began; a resumed run continues from its last record."""
        return time.monotonic() - self._started

    @cached_property
    def _events(self) -> "_EventFile":
        return _EventFile(self.path.parent / "tensorboard", self._purge_step)

    def log(self, kind: str, step: int, tokens: int, values: Mapping[str, Any]) -> None:
        """Write one record to all places.

        ``step`` counts optimizer steps done, ``tokens`` target tokens seen. ``values`` may hold numbers, strings,
        0-d tensors, lists and nested mappings. TensorBoard and W&B get the numbers: those of ``values`` as
        ``kind/name``, those of its ``layers`` mapping as ``layers/<layer>/<name>``. Raises ``UserError`` if it cannot
        be written.
        """
        values = _plain(values)
        record = {"kind": kind, "step": step, "tokens": tokens, "seconds": round(self.seconds, 3), **values}
        line = json.dumps(record, allow_nan=False) + "\n"
        scalars = _scalars(kind, values)
        with disk_errors(self.path, len(line), _KEPT):
            self._file.write(line)
            self._file.flush()
            self._events.add(step, scalars)
        if self._wandb is not None:
            self._wandb.log({"step": step, "tokens": tokens, **scalars})

    def truncate_after(self, step: int, again: Collection[str] = ("end",)) -> None:
        """Take back what stands behind the resumed ``step`` (-1: everything), so that no record stands twice.

        Drops the records of later steps, those of this step whose kind the resumed run writes ``again``, and a torn
        last line; the file is replaced atomically. ``seconds`` goes on from the last record kept, and TensorBoard hides
        the later events. W&B cannot take points back and shows the repeated steps twice.
        """
        assert "_events" not in vars(self), "truncate_after comes before the first log()"
        records = [
            record
            for record in read_metrics(self.path)
            if record["step"] < step or (record["step"] == step and record["kind"] not in again)
        ]
        self._file.close()
        text = "".join(json.dumps(record) + "\n" for record in records)
        with disk_errors(self.path, len(text), _KEPT):
            write_whole(self.path, text)
        self._file = self.path.open("a", encoding="utf-8")
        self._started = time.monotonic() - (records[-1]["seconds"] if records else 0.0)
        self._purge_step = step + 1

    def close(self) -> None:
        """Close everything; further calls do nothing."""
        with suppress(OSError):  # every record was flushed: what fails again was reported by log()
            self._file.close()
        if "_events" in vars(self):
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


class _EventFile:
    """TensorBoard's view of the records.

    Rejected: ``SummaryWriter``, which writes in a thread of its own, where a full disk is a traceback that nobody can
    catch.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """Open a new event file; it hides the events that earlier parts of the run have from ``purge_step`` on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # here, because the import takes a second
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}").open("wb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers by tag."""
        from torch.utils.tensorboard.summary import scalar

        for tag, value in scalars.items():
            self._write(step=step, summary=scalar(tag, value))
        self._file.flush()

    def close(self) -> None:
        """Close the file; as for the records, all that can fail was flushed before."""
        with suppress(OSError):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())


_EVERY_RECORD = (("kind", (str,)), ("step", (int,)), ("seconds", (int, float)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, in the order written.

    A last line that a kill has cut short is left out; a damaged line elsewhere, or a missing file, is a ``UserError``.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run that has started to train")
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or a cut inside a UTF-8 character
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is damaged: remove that line ({error})") from error
        if not isinstance(record, dict) or any(type(record.get(key)) not in kinds for key, kinds in _EVERY_RECORD):
            raise UserError(f"{path}, line {number} is no record of a run: remove that line")
        records.append(record)
    return records


class Meter:
    """Speed and memory since the last reading, for the ``train`` records."""

    def __init__(self, device: torch.device, peak_tflops: float | None, world_size: int) -> None:
        """``peak_tflops`` is that of one device (see ``peak_tflops``), None where unknown."""
        self._device = device
        self._peak_flops = None if peak_tflops is None else peak_tflops * 1e12 * world_size
        self._since = time.perf_counter()
        self._tokens, self._flops = 0, 0.0

    def add(self, tokens: int, flops: float) -> None:
        """Count target tokens trained on, of all ranks together, and the FLOPs of the dense model on them."""
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of the speed (validation, checkpoints)."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """``tokens_per_second``, ``peak_memory_mb`` and, where the peak is known, ``mfu``; starts the next interval.

        On CUDA the caller has synchronised, for instance by reading the loss.
        """
        now = time.perf_counter()
        seconds = now - self._since
        speed, flops = self._tokens / seconds, self._flops / seconds
        self._since, self._tokens, self._flops = now, 0, 0.0
        values = {"tokens_per_second": speed, "peak_memory_mb": peak_memory_mb(self._device)}
        if self._peak_flops is not None:
            values["mfu"] = flops / self._peak_flops
        return values


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used since the process began, in MB (1e6 bytes): the GPU's allocator, or on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def peak_tflops(device: torch.device, settings: MetricsSettings) -> float | None:
    """Peak of one device in TFLOP/s: as set, or the dense bf16 peak of a known GPU, or None."""
    if settings.peak_tflops is not None:
        return settings.peak_tflops
    if device.type != "cuda":
        return None
    return _known_peak(torch.cuda.get_device_name(device))


def _known_peak(device_name: str) -> float | None:
    if "MIG" in device_name:  # a slice of a GPU carries the name of the whole
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tensors and NumPy numbers as Python numbers, non-finite ones as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    named = {f"{kind}/{name}": value for name, value in values.items()}
    for layer, figures in values.get("layers", {}).items():
        named |= {f"layers/{layer}/{name}": value for name, value in figures.items()}
    return {name: value for name, value in named.items() if type(value) in (int, float)}


def _import_wandb(project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"`metrics.wandb_project` = {project!r}: the package wandb is not installed; "
            "run `pip install llm-cht[wandb]` or leave the setting out"
        ) from error
    return wandb


def _start_wandb(run: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    """The W&B run of this run folder: its id lies in the folder, so that a resume continues the same curves."""
    id_file = run / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    tracker = _import_wandb(project).init(
        project=project,
        id=id_file.read_text(encoding="utf-8"),
        name=run.name,
        dir=str(run),
        config=dict(config or {}),
        resume="allow",
    )
    tracker.define_metric("*", step_metric="step")
    return tracker
