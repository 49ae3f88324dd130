"""The runs of a sweep, one after the other, each as the user would start it: ``llm-cht train RUN/config.yaml``.

Each is a process of its own, so that a crash ends one run only and all memory comes back. Its settings are written to
RUN/config.yaml first and it is started with ``--resume auto``: a new run, one that was stopped and one that failed are
then the same case. Its process group is its own, and signals are passed on: a CTRL-C reaches it once, not twice, which
would cut its save short. Rejected: training in this process (memory that libraries keep, and one crash ends all), and
several runs at once (they would share the device; start another sweep with another folder).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from llm_cht import config
from llm_cht.errors import UserError, nearest
from llm_cht.files import disk_errors, write_whole
from llm_cht.sweep.settings import Run, Sweep
from llm_cht.train.metrics import FILE_NAME, read_metrics
from llm_cht.train.rundir import CONFIG_NAME, changed, locked, write_config

RESULTS = "results.jsonl"
LOG = "log.txt"

Records = dict[str, dict[str, Any]]
"""name of a run -> its line in the results"""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.2
_KEEP = ("data.source", "data.validation", "data.tokenizer")
KEPT = "The runs are whole; the same command goes on."


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    stopped_by: str | None
    """name of the signal that ended it early"""
    failed: list[str]
    """names of the runs that failed"""


class Stop:
    """Context manager: while it is open, signals to stop are collected instead of ending this process."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    @property
    def requested(self) -> str | None:
        """Name of the first signal."""
        return signal.Signals(self.received[0]).name if self.received else None


def load_records(folder: Path) -> Records:
    """The results of a sweep's folder so far; none if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    path = folder / RESULTS
    records: Records = {}
    if not path.exists():
        return records
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            records[record["name"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged: remove that line ({error})") from error
    return records


def _save_records(folder: Path, records: Records) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records.values())
    with disk_errors(folder / RESULTS, len(lines), KEPT):
        write_whole(folder / RESULTS, lines)


def is_finished(run: Run, records: Records) -> bool:
    """Whether a run has its result; where its folder was removed it has to be run again."""
    return "summary" in records.get(run.name, {}) and (run.folder / CONFIG_NAME).is_file()


def check_folders(runs: Sequence[Run], records: Records) -> None:
    """Refuse to mix: what lies in the folder of a run must be that run.

    Raises:
        UserError: naming the run, what differs, and the remedy.
    """
    for run in runs:
        path = run.folder / CONFIG_NAME
        begun = is_finished(run, records) or any((run.folder / "checkpoints").glob("step-*"))
        if path.is_file() and begun:
            change = changed(config.load_yaml(path), run.settings, _KEEP)
            if change is not None:
                raise UserError(
                    f"{change} in {path}: the run `{run.name}` was made with other settings; give the sweep another "
                    f"`folder`, undo the change, or remove {run.folder} to run it again"
                )
        elif run.folder.is_dir() and not path.is_file() and _visible(run.folder):
            raise UserError(f"{run.folder} is not empty and holds no run; move it away, or give another `folder`")


def _visible(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def run_sweep(sweep: Sweep, runs: Sequence[Run], say: Callable[[str], None]) -> Outcome:
    """Make every run that has no result yet, and write each result down at once.

    Raises:
        UserError: another sweep works in the folder, or it holds runs with other settings, or the metric of the sweep
            is none of a run's.
    """
    taken = f"another sweep is working in {sweep.folder}; wait until it ends or stop it, or give another `folder`"
    with locked(sweep.folder, taken, "Nothing was written; give another `folder`."), Stop() as stop:
        records = load_records(sweep.folder)
        check_folders(runs, records)
        for run in runs:
            if is_finished(run, records):
                _check_metric(sweep, records[run.name])
        todo = [run for run in runs if not is_finished(run, records)]
        done = len(runs) - len(todo)
        say(f"{sweep.folder}: {len(runs)} runs, {done} finished before")
        failed = []
        with tqdm(total=len(runs), initial=done, desc="sweep", unit="run", dynamic_ncols=True, disable=None) as bar:
            for number, run in enumerate(todo, start=done + 1):
                if stop.requested:
                    break
                told = f"[{number} of {len(runs)}] {run.name}"
                if records.pop(run.name, None) is not None:  # what it was before says nothing about what it is now
                    _save_records(sweep.folder, records)
                record = _make(run, bar, stop)
                if record is None:
                    say(f"{told}: stopped; its log is {run.folder / LOG}")
                    break
                records[run.name] = record
                _save_records(sweep.folder, records)
                if "failed" in record:
                    failed.append(run.name)
                    say(f"{told}: FAILED after {record['seconds']:.0f} s: {record['failed']}")
                else:
                    _check_metric(sweep, record)
                    figure = record["summary"][sweep.metric]
                    shown = "not finite" if figure is None else f"{figure:.6g}"
                    say(f"{told}: {sweep.metric} {shown} in {record['seconds']:.0f} s")
                bar.update()
            else:
                return Outcome(None, failed)
    return Outcome(stop.requested or "a signal", failed)


def _check_metric(sweep: Sweep, record: dict[str, Any]) -> None:
    figures = [key for key, value in record["summary"].items() if value is None or type(value) in (int, float)]
    if sweep.metric not in figures:
        raise UserError(
            f"`metric` = {sweep.metric!r} in {sweep.file} is no figure of a run's summary; "
            f"{nearest(sweep.metric, figures)} (what has run is kept)"
        )


def _make(run: Run, bar: tqdm, stop: Stop) -> dict[str, Any] | None:
    """Run one run to its end; its record, or None if it was stopped."""
    write_config(run.folder, run.settings)
    log = run.folder / LOG
    start = time.monotonic()
    command = [sys.executable, "-m", "llm_cht.cli", "train", str(run.folder / CONFIG_NAME), "--resume", "auto"]
    with disk_errors(log, 0, KEPT), log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # so that the log is in order, and its last line the last
            process_group=0,
        )
    with _ended(process):
        passed_on = 0
        while process.poll() is None:
            for number in stop.received[passed_on:]:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
                passed_on += 1
            if not bar.disable:
                bar.set_postfix_str(f"{run.name}: {_last_line(log, begin)}")
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
    summary = _summary(run) if process.returncode == 0 else None
    if summary is None and (stop.received or process.returncode == 0):
        return None
    setting = {"factors": run.setting.factors, "overrides": run.setting.overrides}
    record = {"name": run.name, **setting, "seed": run.settings.seed}
    seconds = round(time.monotonic() - start, 1)
    if summary is None:
        return record | {"failed": _reason(process.returncode, _last_line(log, begin)), "seconds": seconds}
    return record | {"summary": summary, "seconds": seconds}


@contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """If the block fails, the process ends too."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _summary(run: Run) -> dict[str, Any] | None:
    """The summary of a run that reached its end; None if a signal stopped it."""
    ends = [record for record in read_metrics(run.folder / FILE_NAME) if record["kind"] == "end"]
    return ends[-1]["summary"] if ends else None


def _last_line(log: Path, begin: int) -> str:
    """The last line with something in it that was written from byte ``begin`` on."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _reason(code: int, line: str) -> str:
    if code >= 0:
        return line.removeprefix("llm-cht: error: ") or f"exit code {code}"
    name = signal.Signals(-code).name
    why = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"ended by {name}{why}; its last line: {line}"
