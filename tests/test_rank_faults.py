"""Faults of runs on many ranks, caused for real under the real launcher.

Each is told once and in words, all ranks end in time, and nothing is lost: the resumed run has the weights, masks and
losses of one that nothing happened to.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_cht.train.checkpoint import CheckpointStore
from tests.helpers import learned, records, tiny_config
from tests.launched import ROOT, Launched, by_hand, launch

GONE = "is gone (killed, out of memory, crashed?)"
STEP = "llm_cht.train.engine:Engine.backward"
SAVE = "llm_cht.train.checkpoint:write_group"
FILES = {"ddp": 2, "zero1": 4, "zero2": 4, "zero3": 4}
"""calls of ``write_group`` on rank 1 in a save"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Twelve steps with updates and checkpoints at 3, 6 and 9."""
    return tiny_config(tmp_path_factory.mktemp("config"), train={"steps": 12}, checkpoint={"every": 3})


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Callable[[str], Path]:
    """Run folder of a run under an engine that nothing happens to."""
    runs: dict[str, Path] = {}

    def _run(engine: str) -> Path:
        if engine not in runs:
            runs[engine] = tmp_path_factory.mktemp(engine) / "run"
            with launch(engine, config, "--run", runs[engine]) as launched:
                codes, (output,) = launched.ends()
            assert codes == [0], output
        return runs[engine]

    return _run


def broken(launched: Launched, note: Path, seconds: float) -> str:
    """Output of a launch that fails, all of it within ``seconds`` of the fault, and leaves no rank behind."""
    with launched:
        codes, (output,) = launched.ends()
        assert time.time() - float(note.read_text()) < seconds
        assert launched.living() == []
    assert codes == [1], output
    no_tracebacks_of_ours(output)
    return output


def no_tracebacks_of_ours(output: str) -> None:
    """The launcher adds one of its own, which cannot be helped."""
    assert f'File "{ROOT / "llm_cht"}' not in output, output


def named(output: str, run: Path, *parts: str) -> None:
    """The one message of the watchdog, with ``parts``."""
    assert output.count("error: the run ended in ") == 1, output
    command = f"accelerate launch YOUR-OPTIONS launch/train.py {run}/config.yaml --resume auto"
    assert output.count(f"Its checkpoints are whole; go on from the last one with: {command}\n") == 1, output
    for part in parts:
        assert output.count(part) == 1, (part, output)


def goes_on(engine: str, run: Path, unbroken: Path, step: int) -> None:
    """The run resumes from ``step`` and becomes what it would have been."""
    with launch(engine, run / "config.yaml", "--resume", "auto") as launched:
        codes, (output,) = launched.ends()
    assert codes == [0], output
    assert output.count(f"resumed from {run}/checkpoints/step-{step:08d}\n") == 1, output
    assert learned(run) == learned(unbroken)
    check_whole(run)


def check_whole(run: Path) -> None:
    """Every checkpoint is intact, and nothing half-written lies about."""
    for folder in (run / "checkpoints").glob("step-*"):
        CheckpointStore(run / "checkpoints", keep_last=1).load(folder)
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix in (".partial", ".new")]


def fault(folder: Path, rank: int, at: str, call: int, do: str) -> dict[str, Any]:
    return {"rank": rank, "at": at, "call": call, "do": do, "note": str(folder / "note")}


# ---- a rank is killed ----


def killed(folder: Path, config: Path, engine: str, rank: int, at: str, call: int) -> str:
    launched = launch(engine, config, "--run", folder / "run", fault=fault(folder, rank, at, call, "kill"))
    return broken(launched, folder / "note", 30)


def test_a_rank_killed_in_a_save(config, unbroken, tmp_path):
    output = killed(tmp_path, config, "ddp", 1, SAVE, 2 * FILES["ddp"])
    named(output, tmp_path / "run", "error: the run ended in the save of step 6, because 1 of 2 ranks is lost", GONE)
    goes_on("ddp", tmp_path / "run", unbroken("ddp"), 3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize(
    "moment",
    [
        (0, STEP, 8, "step 8", 6),
        # of 14 layers: in the middle of the second update, which follows step 6
        (1, "llm_cht.evolve.updater:TopologyUpdater._apply", 20, "the topology update of step 6", 3),
        (1, "llm_cht.train.checkpoint:describe", 0, "the save of step 6", 3),
    ],
)
def test_a_killed_rank(config, unbroken, tmp_path, engine, moment):
    rank, at, call, where, last = moment
    call = 2 * FILES[engine] if where.startswith("the save") else call
    output = killed(tmp_path, config, engine, rank, at, call)
    named(output, tmp_path / "run", f"error: the run ended in {where}, because", f"  rank {rank} (", GONE)
    goes_on(engine, tmp_path / "run", unbroken(engine), last)


@pytest.mark.slow
@pytest.mark.parametrize("at", [SAVE, "llm_cht.train.checkpoint:write_manifest", "llm_cht.train.checkpoint:discard"])
def test_rank_0_killed_while_it_writes(config, unbroken, tmp_path, at):
    output = killed(tmp_path, config, "zero2", 0, at, {SAVE: 6}.get(at, 2))
    named(output, tmp_path / "run", "rank 0 (", GONE)
    step = max(int(folder.name[-8:]) for folder in (tmp_path / "run" / "checkpoints").glob("step-*"))
    goes_on("zero2", tmp_path / "run", unbroken("zero2"), step)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
@pytest.mark.parametrize("at", ["llm_cht.train.run:check_shared", "llm_cht.train.run:build"])
def test_a_rank_killed_while_the_run_starts(config, tmp_path, engine, at):
    output = killed(tmp_path, config, engine, 1, at, 1)
    assert output.count("error: the run ended in the start, because 1 of 2 ranks is lost or stuck:\n  rank 1 (") == 1
    assert output.count("No step was taken and no checkpoint touched; start it again as before\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_without_a_launcher_do_not_wait_for_one_that_died(config, tmp_path):
    arguments: list[str | Path] = [config, "--run", tmp_path / "run"]
    with by_hand([arguments, arguments], fault(tmp_path, 1, "llm_cht.train.run:build", 1, "kill")) as started:
        codes, (output, _) = started.ends()
        assert time.time() - float((tmp_path / "note").read_text()) < 15
    assert codes == [1, -9]
    assert "error: the run ended in the start" in output
    no_tracebacks_of_ours(output)


@pytest.mark.slow
def test_a_rank_that_never_comes(config, tmp_path):
    arguments: list[str | Path] = [config, "--run", tmp_path / "run", "--train.timeout_s", "5"]
    dies = fault(tmp_path, 1, "llm_cht.train.run:start_engine", 1, "kill")
    with by_hand([arguments, arguments], dies) as started:
        codes, (output, _) = started.ends()
    assert codes == [2, -9], output
    assert output.count("llm-cht: error: rank 0 of 2 lost another rank, or waited for it in vain") == 1, output
    no_tracebacks_of_ours(output)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_the_launcher_starts_the_ranks_again(config, unbroken, tmp_path, engine):
    dies = fault(tmp_path, 1, STEP, 8, "kill")
    with launch(engine, config, "--run", tmp_path / "run", fault=dies, restarts=1) as launched:
        codes, (output,) = launched.ends()
    assert codes == [0], output
    named(output, tmp_path / "run", "rank 1 (", f"resumed from {tmp_path}/run/checkpoints/step-00000006\n")
    no_tracebacks_of_ours(output)
    assert learned(tmp_path / "run") == learned(unbroken(engine))
    check_whole(tmp_path / "run")


# ---- a rank is slow, or stops ----


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rank"), [("ddp", 0), ("zero2", 1)])
def test_a_rank_that_stops_answering(config, unbroken, tmp_path, engine, rank):
    run, stops = tmp_path / "run", fault(tmp_path, rank, STEP, 8, "stop")
    launched = launch(engine, config, "--run", run, "--train.timeout_s", "10", fault=stops)
    output = broken(launched, tmp_path / "note", 70)  # the launcher takes 30 s to kill what is stopped
    named(output, run, "error: the run ended in step 8, because 1 of 2 ranks", f"  rank {rank} (", "does not answer")
    goes_on(engine, run, unbroken(engine), 6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_slow_rank_is_warned_of_and_waited_for(config, unbroken, tmp_path, engine):
    sleeps = fault(tmp_path, 1, STEP, 8, "sleep")
    with launch(engine, config, "--run", tmp_path / "run", "--train.timeout_s", "13", fault=sleeps) as launched:
        codes, (output,) = launched.ends()
    assert codes == [0], output
    assert output.count("warning: waiting ") == 1, output
    if engine == "zero2":
        assert "s for rank 1 (" in output
    else:  # who computes and who waits in a backward pass cannot be told apart
        assert "s for one of all ranks, rank 0 (" in output
        assert "; rank 1 (" in output
    assert "error:" not in output
    assert learned(tmp_path / "run") == learned(unbroken(engine))


# ---- a rank is different ----


def refused_by_hand(of_rank: list[list[str | Path]], environments: list[dict[str, str]]) -> str:
    """What rank 0 says when two ranks that were started by hand are not alike; rank 1 says nothing."""
    with by_hand(of_rank, environments=environments) as started:
        codes, (first, second) = started.ends()
    assert codes == [2, 2], (first, second)
    assert first.count("llm-cht: error: ") == 1, first
    assert "llm-cht: error: " not in second, second
    no_tracebacks_of_ours(first + second)
    return first


def test_a_rank_with_another_config(config, tmp_path):
    arguments = [config, "--run", tmp_path / "run"]
    told = refused_by_hand([arguments, [*arguments, "--optimizer.lr", "0.001"]], [{}, {}])
    assert "`optimizer.lr` is 0.001 on rank 1" in told
    assert "and 0.003 on rank 0; start all ranks with one config and one environment" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_with_another_version(config, tmp_path):
    arguments = [config, "--run", tmp_path / "run"]
    told = refused_by_hand([arguments, arguments], [{}, {"LLM_CHT_REPORTED_VERSIONS": '{"transformers": "5.0.0"}'}])
    assert "the version of transformers is '5.0.0' on rank 1" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_flipped_bit_in_the_mask_of_a_rank(config, unbroken, tmp_path, engine):
    flips = fault(tmp_path, 1, "llm_cht.evolve.updater:TopologyUpdater._agree", 2, "flip")
    output = broken(launch(engine, config, "--run", tmp_path / "run", fault=flips), tmp_path / "note", 30)
    told = (
        "llm-cht: error: after the topology update of step 6 the mask of `model.layers.0.self_attn.q_proj` on rank(s)"
    )
    assert output.count(told) == 1, output
    assert output.count("error: ") == 1, output
    goes_on(engine, tmp_path / "run", unbroken(engine), 3)


# ---- the disk of a rank is full ----


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rank"), [("ddp", 1), ("zero2", 0), ("zero2", 1)])
def test_a_full_disk_of_one_rank(config, unbroken, tmp_path, engine, rank):
    run, call = tmp_path / "run", 2 * (FILES[engine] if rank else 4)
    full = fault(tmp_path, rank, SAVE, call, "full disk")
    output = broken(launch(engine, config, "--run", run, fault=full), tmp_path / "note", 30)
    told = f"llm-cht: error: rank {rank} of 2: cannot write {run}/checkpoints/step-00000006: "
    assert output.count(told) == 1, output
    assert output.count("llm-cht: error: ") == 1, output
    assert "File too large" in output
    assert "The last checkpoint, step-00000003, is untouched. Free space" in output
    check_whole(run)
    goes_on(engine, run, unbroken(engine), 3)


# ---- signals ----


def stopped(output: str, run: Path, name: str, step: int) -> None:
    """All saved and said so once."""
    command = f"accelerate launch YOUR-OPTIONS launch/train.py {run}/config.yaml --resume auto"
    told = f"{name}: saved {run}/checkpoints/step-{step:08d}\nresume with: {command}\n"
    assert output.count(told) == 1, output
    assert output.count("resume with: ") == 1, output
    no_tracebacks_of_ours(output)
    check_whole(run)
    assert [record["step"] for record in records(run, "train")] == list(range(1, step + 1))


def test_sigterm_to_one_rank(config, tmp_path):
    run = tmp_path / "run"
    with launch("ddp", config, "--run", run, fault=fault(tmp_path, 1, STEP, 8, "term")) as launched:
        codes, (output,) = launched.ends()
    assert codes == [0], output
    stopped(output, run, "SIGTERM", 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [("ddp", 1, "usr1", "SIGUSR1"), ("zero2", 0, "usr1", "SIGUSR1"), ("zero3", 1, "term", "SIGTERM")],
)
def test_a_signal_to_one_rank_stops_all(config, unbroken, tmp_path, sent):
    engine, rank, do, name = sent
    run = tmp_path / "run"
    with launch(engine, config, "--run", run, fault=fault(tmp_path, rank, STEP, 8, do)) as launched:
        codes, (output,) = launched.ends()
    assert codes == [0], output
    stopped(output, run, name, 8)
    goes_on(engine, run, unbroken(engine), 8)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_ctrl_c_of_the_launcher(config, unbroken, tmp_path, engine):
    run = tmp_path / "run"
    sleeps = fault(tmp_path, 1, STEP, 8, "sleep")  # so that the step lasts until the signal is there
    with launch(engine, config, "--run", run, fault=sleeps) as launched:
        wait_for(tmp_path / "note")
        os.killpg(launched.processes[0].pid, signal.SIGINT)
        codes, (output,) = launched.ends()
        assert launched.living() == []
    assert codes[0] != 0  # the launcher's own, which never tells how its ranks ended after a signal
    stopped(output, run, "SIGINT", 8)
    goes_on(engine, run, unbroken(engine), 8)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- again and again ----


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments(config, tmp_path):
    run, reference, draw = tmp_path / "run", tmp_path / "reference", random.Random(1)
    settings = (
        "--method.preset",
        "chtss",
        "--train.steps",
        "240",
        "--checkpoint.every",
        "2",
        "--validation.every",
        "50",
    )
    with launch("zero2", config, "--run", reference, *settings, "--checkpoint.keep_last", "1000") as launched:
        codes, (output,) = launched.ends()
        assert codes == [0], output
    saving = 0
    for number in range(20):
        with launch("zero2", config, "--run", run, *settings, "--resume", "auto") as launched:
            wait_for_new_record(run, launched)
            time.sleep(draw.uniform(0, 1.0))
            if number % 3 == 0:
                wait_for_save(run)
            rank = draw.randrange(2)
            (process,) = launched.living(f"RANK={rank}")
            saving += bool(list((run / "checkpoints").glob(".step-*.new")))
            os.kill(process, signal.SIGKILL)
            codes, (output,) = launched.ends(60)
        assert codes == [1], output
        named(output, run, f"  rank {rank} (", GONE)
        same_checkpoints(run, reference)
    assert saving >= 5
    with launch("zero2", config, "--run", run, *settings, "--resume", "auto") as launched:
        codes, (output,) = launched.ends()
    assert codes == [0], output
    assert learned(run) == learned(reference)
    same_checkpoints(run, reference)
    check_whole(run)


def same_checkpoints(run: Path, reference: Path) -> None:
    """Weights, moments and topology of every checkpoint are those of the reference at that step."""
    for folder in (run / "checkpoints").glob("step-*"):
        assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "model-rank-00001.safetensors"}
        for path in sorted(set(folder.glob("*.safetensors")) - set(folder.glob("random*"))):
            assert path.read_bytes() == (reference / "checkpoints" / folder.name / path.name).read_bytes(), path


def wait_for_new_record(run: Path, launched: Launched) -> None:
    path = run / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    end = time.monotonic() + 120
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert time.monotonic() < end
        assert launched.processes[0].poll() is None, launched.ends()
        time.sleep(0.02)


def wait_for_save(run: Path) -> None:
    end = time.monotonic() + 60
    while not list((run / "checkpoints").glob(".step-*.new")):
        assert time.monotonic() < end
