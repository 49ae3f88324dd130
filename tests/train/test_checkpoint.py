"""Real faults: flipped bits, kills at every stage of a save, a disk that is really full, folders without permission."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from llm_cht.errors import UserError
from llm_cht.train import checkpoint, integrity
from llm_cht.train.checkpoint import CheckpointStore, resolve
from llm_cht.train.signals import StopSignals

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def tensors(step, size=16):
    return {"model": {"w": torch.full((size,), float(step))}, "optimizer": {"m": torch.arange(5) + step}}


def save(store, step, best=False):
    return store.save(step, tensors(step), {"step": step, "loss": 1 / 3}, best)


def names(root):
    return sorted(path.name for path in root.iterdir())


def fail(message):
    raise AssertionError(message)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_round_trip_is_exact(store):
    base = torch.arange(12.0).view(3, 4)
    group = {
        "contiguous": base,
        "transposed": base.T,
        "row of the same storage": base[1],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "float64": torch.tensor([float("nan"), -0.0], dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.rand(3)),
    }
    state = {"loss": 0.1 + 0.2, "best": float("inf"), "nested": {"none": None, "text": "é", "list": [1, 2]}}
    path = store.save(7, {"model": group, "topology": {}}, state)
    found = store.load(path)
    assert (found.path, found.step, found.state, found.world_size) == (path, 7, state, 1)
    assert found.tensors("topology") == {}
    assert found.names("model") == group.keys()
    for name, tensor in found.tensors("model").items():
        assert tensor.shape == found.shape("model", name), name
        assert tensor.dtype == group[name].dtype, name
        torch.testing.assert_close(tensor, group[name].detach(), rtol=0, atol=0, equal_nan=True)
    assert names(path) == ["manifest.json", "model.safetensors", "state.json", "topology.safetensors"]


def test_keeps_the_last_ones_and_the_best(store):
    assert store.best() is None
    for step in range(10, 60, 10):
        save(store, step, best=step == 20)
    assert names(store.root) == ["best.json", "step-00000020", "step-00000040", "step-00000050"]
    assert json.loads((store.root / "best.json").read_text()) == {"folder": "step-00000020"}
    assert store.best() == store.root / "step-00000020"
    save(store, 60, best=True)
    assert names(store.root) == ["best.json", "step-00000050", "step-00000060"]
    assert json.loads((store.root / "best.json").read_text()) == {"folder": "step-00000060"}


def test_best_pointer_is_made_good_after_a_kill_before_it_was_written(store):
    save(store, 10, best=True)
    save(store, 20, best=True)
    (store.root / "best.json").write_text('{"folder": "step-00000010"}')
    save(store, 30)
    assert json.loads((store.root / "best.json").read_text()) == {"folder": "step-00000020"}


def test_the_best_stays_so_when_its_step_is_saved_again(store):
    save(store, 10, best=True)
    for step in (10, 20, 30, 40):
        save(store, step)
    assert store.best() == store.root / "step-00000010"


def test_a_run_resumed_from_an_older_step_leaves_its_abandoned_branch(store):
    for step in (10, 20, 30):
        save(store, step, best=step == 30)
    save(store, 15)
    assert names(store.root) == ["step-00000015"]
    assert (store.newest(fail).step, store.best()) == (15, None)


def test_same_step_is_replaced(store):
    save(store, 10)
    path = store.save(10, tensors(99), {"new": True})
    assert store.load(path).state == {"new": True}
    assert store.load(path).read("model", "w", 0, 1) == 99
    assert names(store.root) == ["step-00000010"]


def test_steps_sort_by_number(store):
    for step in (99_999_999, 100_000_000):
        save(store, step)
    assert store.newest(fail).step == 100_000_000


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="keep_last = 0"):
        CheckpointStore(tmp_path, 0)


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": lambda path: flip(path, random.Random(path.name)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 10),
    "emptied": lambda path: os.truncate(path, 0),
    "missing": os.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_newest_good_one_used(store, name, damage):
    save(store, 10)
    path = save(store, 20)
    DAMAGES[damage](path / name)
    with pytest.raises(UserError, match=rf"step-00000020.*{name}.*--resume auto"):
        store.load(path)
    told = []
    assert store.newest(told.append).step == 10
    assert len(told) == 1
    assert name in told[0]


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unseen(store, name):
    path = save(store, 10)
    good, rng = (path / name).read_bytes(), random.Random(0)
    for _ in range(100):
        flip(path / name, rng)
        with pytest.raises(UserError):
            store.load(path)
        (path / name).write_bytes(good)
    assert store.load(path).step == 10


def test_no_checkpoint_at_all_and_only_damaged_ones(store):
    assert store.newest(fail) is None
    for step in (10, 20):
        (save(store, step) / "state.json").unlink()
    told = []
    with pytest.raises(UserError, match=r"all 2 checkpoints .* damaged"):
        store.newest(told.append)
    assert len(told) == 2


def test_another_format_is_refused(store, monkeypatch):
    monkeypatch.setattr(integrity, "FORMAT", 3)
    path = save(store, 10)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 3, this version reads 1 to 2"):
        store.load(path)


def test_format_1_is_still_read(store, monkeypatch):
    path = save(store, 10)
    files = integrity.read_manifest(path)["files"]
    monkeypatch.setattr(integrity, "FORMAT", 1)
    integrity.write_manifest(path, {"step": 10, "best": True}, files)
    monkeypatch.undo()
    found = store.load(path)
    assert (found.step, found.world_size, store.best()) == (10, 1, path)


SIZE = 50_000


def check_after_kill(store, least):
    """Whatever is visible is whole, the newest is no older than ``least``, and the next save cleans up."""
    found = store.newest(fail)
    assert found.step >= least
    for path in store.root.glob("step-*"):
        whole = store.load(path)
        assert torch.equal(whole.tensor("model", "w"), torch.full((SIZE,), float(whole.step)))
    store.save(found.step + 1, tensors(found.step + 1, SIZE), {})
    assert all(name == "best.json" or name.startswith("step-") for name in names(store.root))
    return found.step + 1


def in_killed_child(work, after=None):
    """Run ``work`` in a forked process, killed by itself or after some seconds; False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_kill_at_each_stage_of_a_save(tmp_path, again):
    """SIGKILL at the k-th function call within a save, k rising until the save gets through."""
    kills = 0
    for k in range(0, 10_000, 41):
        store = CheckpointStore(tmp_path / str(k), 2)
        store.save(1, tensors(1, SIZE), {})

        def work(store=store, k=k):
            left = k

            def count(frame, event, arg):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(count)
            store.save(1 if again else 2, tensors(1 if again else 2, SIZE), {})

        if not in_killed_child(work):
            break
        kills += 1
        check_after_kill(store, least=1)
        shutil.rmtree(store.root)
    assert kills > 15, "the save must have been killed at many stages"


def test_save_sweeps_leftovers_of_other_steps_and_nothing_else(store):
    save(store, 10)
    for name in (".step-00000020.new", ".step-00000010.old", ".step-00000005.trash", ".mine", "notes"):
        (store.root / name).mkdir()
    save(store, 30)
    assert names(store.root) == [".mine", "notes", "step-00000010", "step-00000030"]


def test_kill_at_random_moments(store):
    started = time.perf_counter()
    store.save(1, tensors(1, SIZE), {})
    seconds = time.perf_counter() - started  # delays in units of a save, whatever the machine is doing besides
    rng, last = random.Random(0), 1
    for _ in range(15):

        def work(start=last):
            for step in range(start, start + 10_000):  # the first save replaces the last checkpoint
                store.save(step, tensors(step, SIZE), {}, best=step % 3 == 0)

        assert in_killed_child(work, after=rng.uniform(0, 5 * seconds))
        last = check_after_kill(store, last)


def test_ctrl_c_twice_during_a_save_does_not_harm_it(store, monkeypatch):
    original = checkpoint.write_group

    def interrupted(*arguments):
        original(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "write_group", interrupted)  # two files, two signals
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt), signals.hold():
        save(store, 10)
    assert store.newest(fail).step == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError], ids=["interrupt", "defect"])
def test_what_is_no_disk_error_passes_and_leaves_nothing(store, monkeypatch, error):
    def fails(*arguments):
        raise error

    save(store, 10)
    monkeypatch.setattr(checkpoint, "write_manifest", fails)
    with pytest.raises(error):
        save(store, 20)
    assert names(store.root) == ["step-00000010"]


def check_failed_save(store, action, reason):
    """Saving step 20 fails with one clear error; step 10 is good and nothing else is left."""
    save(store, 10)
    with action(), pytest.raises(UserError) as caught:
        store.save(20, tensors(20, 500_000), {"text": "x"})
    message = str(caught.value)
    for part in (reason, str(store.root / "step-00000020"), "takes 2.0 MB", "step-00000010, is untouched"):
        assert part in message
    assert names(store.root) == ["step-00000010"]
    assert store.newest(fail).step == 10
    store.save(20, tensors(20, 16), {})
    assert store.newest(fail).step == 20


class LimitFileSize:
    def __enter__(self):
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.old[1]))  # Python ignores SIGXFSZ

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


def test_file_size_limit(store):
    check_failed_save(store, LimitFileSize, "File too large")


class Nobody:
    """Root is allowed everything, so be another user for a moment."""

    def __enter__(self):
        self.user = os.geteuid()
        if self.user == 0:
            os.seteuid(65534)

    def __exit__(self, *error):
        os.seteuid(self.user)


def test_no_write_permission():
    with tempfile.TemporaryDirectory() as folder:  # every user may enter it, unlike tmp_path
        os.chmod(folder, 0o755)
        store = CheckpointStore(Path(folder, "checkpoints"), 2)
        save(store, 10)
        store.root.chmod(0o555)
        with Nobody(), pytest.raises(UserError, match=r"Permission denied.*step-00000010, is untouched"):
            save(store, 20)
        assert store.newest(fail).step == 10
        assert names(store.root) == ["step-00000010"]
        store.root.chmod(0o755)


def test_unreadable_folder(store):
    store.root.mkdir()
    store.root.chmod(0o000)
    with Nobody(), pytest.raises(UserError, match="cannot look for checkpoints"):
        store.newest(fail)


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here; test_file_size_limit stands in")
    try:
        store = CheckpointStore(disk / "checkpoints", 2)
        check_failed_save(store, StopSignals, "No space left on device")
        filler = disk / "filler"  # the last file, not the first, does not fit
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        with pytest.raises(UserError, match=r"No space left on device.*step-00000020, is untouched"):
            store.save(30, tensors(30), {"text": "x" * 20_000})
        assert store.newest(fail).step == 20
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_resolve(store, tmp_path):
    assert resolve(None, store.root, fail) is None
    assert resolve("auto", store.root, fail) is None
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        resolve(str(tmp_path), store.root, fail)
    first, _ = save(store, 10), save(store, 20)
    shutil.copytree(first, tmp_path / "copy")
    for resume, step in [("auto", 20), (tmp_path, 20), (store.root, 20), (first, 10), (tmp_path / "copy", 10)]:
        assert resolve(str(resume), store.root, fail).step == step
    (first / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        resolve(str(first), store.root, fail)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        resolve(str(store.root / "step-00000077"), store.root, fail)
