"""Checkpoints of many ranks, with real ranks: other numbers of them, and faults of one that concern all."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from llm_cht.train.checkpoint import CheckpointStore
from llm_cht.train.random_state import random_state
from tests.train.ranks import check_content, whole

ROOT = Path(__file__).parents[2]


def spawn(num_ranks, case, folder, **environment):
    """Exit code and output of ``ranks.py`` on so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", f"--master_port={port}"]
    done = subprocess.run(
        [*run, str(ROOT / "tests" / "train" / "ranks.py"), case, str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )
    return done.returncode, done.stdout + done.stderr


def seen(num_ranks, folder):
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def four():
    """A folder that four ranks have been through, and what each of them saw."""
    with tempfile.TemporaryDirectory() as name:  # every user may enter it
        folder = Path(name)
        folder.chmod(0o755)
        model = {name: whole(10, name) for name in ("matrix", "cube")}
        CheckpointStore(folder / "checkpoints", 3).save(10, {"model": model, "random": random_state()}, {})
        code, output = spawn(4, "four", folder)
        assert code == 0, output
        yield folder, seen(4, folder)


def same_on_all(told, key):
    assert len({each[key] for each in told}) == 1, [each[key] for each in told]
    return told[0][key]


def test_what_four_saved_one_can_load(four):
    folder, _ = four
    path = folder / "checkpoints" / "step-00000030"
    check_content(CheckpointStore(folder / "checkpoints", 3).load(path))
    names = {entry.name for entry in path.iterdir()}
    assert {"model.safetensors", "model-rank-00003.safetensors", "topology-rank-00002.safetensors"} <= names
    assert not {"topology-rank-00001.safetensors", "optimizer-rank-00001.safetensors"} & names


def test_what_four_saved_two_can_load_and_save_again(four, tmp_path):
    folder, _ = four
    os.symlink(folder / "checkpoints" / "step-00000020", tmp_path / "step-00000020")
    code, output = spawn(2, "load", tmp_path)
    assert code == 0, output
    files = ["manifest.json", "model-rank-00001.safetensors", "model.safetensors", "state.json"]
    assert [each["files"] for each in seen(2, tmp_path)] == [files] * 2
    again = CheckpointStore(tmp_path / "again", 1).newest(print)
    assert all(torch.equal(again.tensor("model", name), whole(20, name)) for name in again.names("model"))
    assert (len(again.names("model")), again.world_size) == (6, 2)


@pytest.mark.parametrize(
    ("fault", "parts"),
    {
        "file size": ("rank 2 of 4: cannot write", "step-00000040: ", "File too large", "step-00000030, is untouched"),
        "permission": ("rank 1 of 4: cannot write", "Permission denied", "step-00000030, is untouched"),
        "gap": ("rank 0 of 4: the pieces of `matrix`", "element 41 is in none of the files", "please report"),
        "twice": ("the pieces of `history`", "element 0 is in two of the files", "please report"),
        "damaged": ("of 4: checkpoint ", "step-00000050", "model-rank-00003.safetensors does not have the content"),
        "start": ("rank 1 of 4: node ", "does not see", ".shared-", "give a `run` folder"),
        "save": ("rank 1 of 4: node ", "does not see", ".step-00000001.new", "give a `run` folder"),
        "hidden": ("rank 0 of 4: node ", "does not see", "which rank 1 has written", "give a `run` folder"),
    }.items(),
)
def test_a_fault_of_one_rank_is_told_on_all_and_leaves_what_was_there(four, fault, parts):
    _, told = four  # the ranks have seen after each that the earlier checkpoints are good and nothing else is left
    if fault == "permission" and os.geteuid() != 0:
        pytest.skip("only root can be another user on one rank")
    message = same_on_all(told, fault)
    for part in parts:
        assert part in message


def test_a_defect_on_one_rank_leaves_nobody_waiting(four):
    _, told = four
    assert told[0]["defect"].startswith("TypeError: ")
    assert {each["defect"].partition("TypeError: ")[0] for each in told[1:]} == {"UserError: rank 0 of 4: "}


def test_a_damaged_checkpoint_is_skipped_by_all_and_rank_0_tells(four):
    _, told = four
    assert [len(each["told"]) for each in told] == [1, 0, 0, 0]
    assert "model-rank-00003" in told[0]["told"][0]


def test_new_ranks_draw_by_seed_rank_and_step(four):
    _, told = four
    first, other, again = zip(*(each["random"] for each in told), strict=True)
    assert first == again
    assert first[0] == other[0], "rank 0 was there: it goes on where it was"
    for generator in range(3):
        assert len({str(drawn[generator]) for drawn in (*first, *other[1:])}) == 7


def test_nothing_of_a_file_system_that_is_not_shared_is_left_behind(four):
    _, told = four
    assert told[0]["own"] == []


@pytest.mark.parametrize(("rank", "function"), [(1, "write_group"), (1, "describe"), (0, "finish_folder")])
def test_a_rank_killed_during_a_save_costs_that_checkpoint_only(tmp_path, rank, function):
    code, output = spawn(2, "killed", tmp_path, KILL_RANK=str(rank), KILL_AT=function)
    assert code != 0
    assert "SIGKILL" in output
    store = CheckpointStore(tmp_path / "checkpoints", 3)
    found = store.newest(print)
    assert (found.step, found.world_size) == (10, 2)
    assert sorted(path.name for path in store.root.iterdir()) == ["step-00000010"]
