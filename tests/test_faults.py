"""Faults while a run goes on: a full disk, no permission, CTRL-C, a loss that is not finite.

The faults are real. Each run happens in a forked child: limits, user and signals are its own, and torch is imported.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from llm_cht.cli import main
from llm_cht.train.checkpoint import CheckpointStore
from tests.helpers import digest, learned, records, tiny_config, told

NOBODY = 65534


class Child(NamedTuple):
    """The command line in a forked process."""

    pid: int
    err: Path
    """what it wrote to standard error"""

    def finished(self) -> tuple[int, str]:
        """Exit code (minus the signal that ended it) and standard error, waited for."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.err.read_text()


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """Starts the command line in a fork, after ``fault()`` there."""
    with tempfile.TemporaryDirectory() as folder:

        def _start(*arguments: str | Path, fault: Callable[[], None] = lambda: None) -> Child:
            err = Path(folder, "stderr")
            err.write_text("")
            pid = os.fork()
            if pid:
                return Child(pid, err)
            code = 1
            try:
                sys.stdout, sys.stderr = io.StringIO(), err.open("w", buffering=1)
                fault()
                code = main([str(argument) for argument in arguments])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

        yield _start


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, in the folder that holds its config; it also brings in every module that a fork then has."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(tiny_config(folder))]) == 0
    return folder


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of that run as it was after step 15: its config and its run folder."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    shutil.rmtree(run / "model")
    (run / "report.html").unlink()
    return run


def resume(run: Path) -> int:
    return main(["train", str(run / "config.yaml"), "--run", str(run), "--resume", "auto"])


def check_whole(run: Path) -> None:
    """Every checkpoint is intact, and nothing half-written lies about."""
    store = CheckpointStore(run / "checkpoints", keep_last=1)
    for folder in (run / "checkpoints").glob("step-*"):
        store.load(folder)
    odd = [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix in (".partial", ".new")]
    assert not odd


# ---- full disk ----


def file_limit(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # Python ignores SIGXFSZ


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mounts a tmpfs of ``size`` KiB on ``folder``; gives a function that makes it large."""

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode

    folder.mkdir()
    if not mount(f"size={size}k"):
        pytest.skip("mounting a tmpfs is not permitted here; the limit on the size of files stands in")
    try:
        yield lambda: mount("remount,size=16m")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# what cannot be written -> largest size of a file, at which it is the first; steps of the run; between checkpoints
LIMITS = {
    "config.yaml": (1400, 3, 2),
    "tokenizer": (4000, 3, 2),
    "metrics.jsonl": (9000, 20, None),
    "checkpoints/step-00000002": (60_000, 3, 2),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_size_limit_at_each_stage_of_a_run(name, finished, start, tmp_path):
    size, steps, every = LIMITS[name]
    settings = {"train": {"steps": steps}, "checkpoint": {"every": every}, "validation": {"every": None}}
    config = tiny_config(tmp_path, method={"update_interval": 2}, **settings)
    code, err = start("train", config, fault=file_limit(size)).finished()
    told(code, err, f"cannot write {tmp_path / 'run' / name}", "File too large", "MB are free", "Free space")
    check_whole(tmp_path / "run")
    assert main(["train", str(config), "--resume", "auto"]) == 0


def test_a_file_size_limit_leaves_earlier_checkpoints_alone(finished, interrupted, start):
    before = digest(interrupted / "checkpoints")
    arguments = ("train", interrupted / "config.yaml", "--run", interrupted, "--resume", "auto")
    code, err = start(*arguments, fault=file_limit(100_000)).finished()
    told(code, err, "step-00000020", "It takes 0.2 MB", "step-00000015, is untouched", "Free space")
    assert digest(interrupted / "checkpoints") == before
    assert resume(interrupted) == 0
    assert learned(interrupted) == learned(finished / "run")


def kilobytes(*paths: Path) -> int:
    """What files and folders take on a disk."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(-(-file.stat().st_size // 4096) * 4 for file in files)


@pytest.mark.parametrize("name", ["topology_start", "checkpoints/step-00000010", "model", "report.html"])
def test_a_full_disk(name, finished, start, tmp_path):
    whole = finished / "run"
    checkpoint = whole / "checkpoints" / "step-00000015"  # the run here has one, of step 20
    before_export = kilobytes(whole) - kilobytes(checkpoint, whole / "model", whole / "report.html")
    size = {
        "topology_start": 4,
        "checkpoints/step-00000010": before_export + kilobytes(checkpoint) // 2,
        "model": before_export + kilobytes(whole / "model") // 2,
        "report.html": before_export + kilobytes(whole / "model") + kilobytes(whole / "report.html") // 2,
    }[name]
    every = 5 if "step" in name else None
    config = tiny_config(tmp_path, validation={"every": None}, checkpoint={"every": every})
    run = tmp_path / "disk" / "run"
    with small_disk(tmp_path / "disk", size) as enlarge:
        code, err = start("train", config, "--run", run).finished()
        told(code, err, f"cannot write {run / name}", "No space left on device", "ree space")
        assert ("step-00000005, is untouched" in err) == (every == 5)
        check_whole(run)
        assert not (run / "report.html").exists()
        enlarge()
        assert main(["train", str(config), "--run", str(run), "--resume", "auto"]) == 0
        assert learned(run) == learned(whole)


def test_a_full_disk_under_the_data_cache(finished, start, tmp_path):
    cache = tmp_path / "cache"
    arguments = ("prepare", tiny_config(tmp_path), "--data.cache_dir", cache)
    code, err = start(*arguments, fault=file_limit(10_000)).finished()
    told(code, err, f"the data cache {cache} cannot be written", "File too large", "`data.cache_dir`")
    assert not list(cache.glob("*.partial"))
    assert not list(cache.glob("text-*[!k]"))  # the lock may stay
    assert main([str(argument) for argument in arguments]) == 0


# ---- permission ----


def nobody() -> None:
    """Root is allowed everything, so the child becomes another user."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.fixture
def open_folder(finished):
    """A folder that every user may enter, unlike ``tmp_path``, with the data of a tiny run prepared in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        config = tiny_config(folder, data={"cache_dir": str(folder / "cache")}, train={"steps": 4})
        assert main(["train", str(config)]) == 0
        yield folder
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_no_permission(open_folder, start):
    config, run = open_folder / "config.yaml", open_folder / "run"
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = digest(open_folder)

    def refused(*arguments: str | Path, parts: tuple[str, ...]) -> None:
        code, err = start(*arguments, fault=nobody).finished()
        told(code, err, *parts)
        assert "Permission denied" in err
        assert digest(open_folder) == before

    refused("train", config, "--run", open_folder / "new", parts=(f"cannot write {open_folder / 'new'}", "`--run`"))
    refused("train", config, "--resume", "auto", parts=(f"cannot write {run}: ", "folder writable"))
    refused("report", run, parts=(f"cannot write {run / 'report.html'}", "make the folder writable"))
    parts = (f"the data cache {open_folder / 'cache'} cannot be written", "`data.cache_dir`")
    refused("prepare", config, "--data.sequence_length", "16", parts=parts)
    run.chmod(0o111)
    refused("train", config, "--resume", "auto", parts=(f"`run` {run}", "`--run`"))
    run.chmod(0o555)
    (open_folder / "text.txt").chmod(0o000)
    refused("train", config, "--run", open_folder / "new", parts=("text.txt: cannot be read", "permissions"))
    (open_folder / "run" / "config.yaml").chmod(0o000)
    refused("train", config, "--resume", "auto", parts=(f"{run / 'config.yaml'}", "Permission denied"))


# ---- out of memory ----


def memory_limit() -> None:
    """300 MB more than the process has."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 300_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory limit of a process needs Linux")
def test_out_of_memory(finished, start, tmp_path):
    code, err = start("train", tiny_config(tmp_path), "--train.batch_size", "30000", fault=memory_limit).finished()
    told(code, err, "out of memory", "can't allocate memory", "lower `train.micro_batch_size`")
    check_whole(tmp_path / "run")


# ---- losses that are not finite ----

DIVERGED = ("--optimizer.lr", "1e30", "--train.clip_norm", "null", "--checkpoint.every", "1")


def refused_training(config: Path, *arguments: str, capsys: pytest.CaptureFixture) -> str:
    code = main(["train", str(config), *arguments])
    err = capsys.readouterr().err
    told(code, err, "nan", "No checkpoint was overwritten", "Start another run (`--run`)", "lower `optimizer.lr`")
    return err


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path, capsys):
    config, run = tiny_config(tmp_path), tmp_path / "run"
    err = refused_training(config, *DIVERGED, capsys=capsys)
    assert "at step 2. No checkpoint" in err
    assert f"skip such steps: llm-cht train {run}/config.yaml --resume auto --train.on_nonfinite skip" in err
    check_whole(run)
    before = digest(run / "checkpoints")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    skip = ("--resume", "auto", "--train.on_nonfinite", "skip", "--train.max_skipped", "3")
    err = refused_training(run / "config.yaml", *skip, capsys=capsys)
    assert err.count(" skipped: loss") == 3
    assert "at step 5; 3 were skipped (`train.max_skipped`)" in err
    assert digest(run / "checkpoints") == before


def test_a_model_that_diverged_is_neither_saved_nor_exported(finished, tmp_path, capsys):
    config, run = tiny_config(tmp_path, validation={"every": None}), tmp_path / "run"
    skip = ("--train.on_nonfinite", "skip", "--train.max_skipped", "40")
    err = refused_training(config, *DIVERGED, *skip, capsys=capsys)
    assert "validation loss nan after step 20" in err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (run / "model").exists()
    assert main(["report", str(run)]) == 0


def test_infinite_weights_are_not_sorted(finished, tmp_path, capsys):
    config = tiny_config(tmp_path, method={"preset": "set", "update_interval": 1, "removal": "relative_importance"})
    code = main(["train", str(config), "--optimizer.lr", "1e39", "--train.clip_norm", "null", "--lr.rewarm", "off"])
    told(code, capsys.readouterr().err, "weights of `model.layers.0", "not finite after step", "lower `optimizer.lr`")


# ---- CTRL-C ----


@pytest.fixture
def slow_saves(tmp_path):
    """A config whose checkpoints, one a step, are large enough for a signal to fall into a save."""
    size = {"hidden_size": 512, "intermediate_size": 1024}
    model = {"config": "llama_9m", "overrides": {"vocab_size": 300, "num_hidden_layers": 2, **size}}
    return tiny_config(tmp_path, model=model, train={"steps": 500, "batch_size": 1}, checkpoint={"every": 1})


def saving(run: Path, first: int = 2) -> Path:
    """Waits for a save of step ``first`` or later to begin; gives the folder that is there while it lasts."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(run / "checkpoints"):
                if name.endswith(".new") and name >= f".step-{first:08d}":
                    return run / "checkpoints" / name
    raise AssertionError("no save began")


def test_ctrl_c_during_a_save(finished, slow_saves, start, tmp_path):
    run = tmp_path / "run"
    child = start("train", slow_saves)
    folder = saving(run)
    os.kill(child.pid, signal.SIGINT)
    assert folder.exists(), "the signal came too late to test anything"
    code, err = child.finished()
    assert code == 0, err
    assert "Traceback" not in err
    saved = run / "checkpoints" / folder.name.removeprefix(".").removesuffix(".new")
    assert f"SIGINT: saved {saved}\nresume with: llm-cht train {run}/config.yaml --resume auto" in err
    check_whole(run)
    step = CheckpointStore(run / "checkpoints", 1).load(saved).step
    assert [record["step"] for record in records(run, "train")] == list(range(1, step + 1))


def test_ctrl_c_again_and_again_during_a_save(finished, slow_saves, start, tmp_path):
    run = tmp_path / "run"
    child = start("train", slow_saves)
    folder = saving(run)
    while folder.exists():
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.005)
    code, err = child.finished()
    assert (code, err.strip().splitlines()[-1]) == (130, "llm-cht: interrupted")
    assert "Traceback" not in err
    check_whole(run)
    assert (run / "checkpoints" / folder.name.removeprefix(".").removesuffix(".new")).is_dir()
    again = start("train", slow_saves, "--resume", "auto")
    saving(run, first=4)
    os.kill(again.pid, signal.SIGTERM)
    code, err = again.finished()
    assert code == 0, err
    assert "resumed from" in err
    check_whole(run)


def test_ctrl_c_while_the_data_are_read(finished, start, tmp_path):
    source, cache = tmp_path / "pipe.txt", tmp_path / "cache"
    os.mkfifo(source)
    config = tiny_config(tmp_path, data={"source": str(source), "cache_dir": str(cache)})
    child = start("train", config)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # nobody reads yet
            pipe = os.open(source, os.O_WRONLY | os.O_NONBLOCK)
            break
    time.sleep(1)  # a signal just before the reader blocks would not wake it
    os.kill(child.pid, signal.SIGINT)
    code, err = child.finished()
    assert (code, err.strip().splitlines()[-1]) == (130, "llm-cht: interrupted")
    assert "Traceback" not in err
    os.close(pipe)
    assert not (tmp_path / "run").exists()
    assert not cache.exists() or not list(cache.glob("*.partial"))
