"""What every rank of ``test_checkpoint_ranks.py`` runs, under torchrun: ``ranks.py CASE FOLDER``.

Each rank writes what it saw to FOLDER/seen-RANK.json.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.train import checkpoint, shared
from llm_cht.train.checkpoint import CheckpointStore, resolve
from llm_cht.train.pieces import Piece
from llm_cht.train.random_state import random_state, restore_random_state
from llm_cht.train.shared import check_shared

SHAPES = {"matrix": (13, 7), "cube": (3, 4, 5), "vector": (11,), "scalar": (), "empty": (0, 3), "one row": (1, 9)}
CUTS = {  # where each of four ranks begins: unequal, empty at either end and in the middle, in the middle of rows
    "matrix": (0, 5, 40, 41),
    "cube": (0, 0, 17, 60),
    "vector": (0, 11, 11, 11),
    "scalar": (0, 0, 0, 1),
    "empty": (0, 0, 0, 0),
    "one row": (0, 0, 0, 0),
}
DTYPES = {"matrix": torch.float32, "cube": torch.bfloat16, "scalar": torch.float64}
NOBODY = 65534


def whole(step, name):
    """Every element of every step is another number (up to the precision of bfloat16, which holds 0 to 256)."""
    size = torch.Size(SHAPES[name]).numel()
    return (torch.arange(size) + step).to(DTYPES.get(name, torch.int64)).view(SHAPES[name])


def groups(step):
    """What this rank of four (or fewer, where the last has all the rest) holds; rank 1 gives no empty pieces."""
    pieces = {}
    for name, cuts in CUTS.items():
        flat = whole(step, name).view(-1)
        start, stop = [*cuts[: dist.world_size()], len(flat)][dist.rank() : dist.rank() + 2]
        if dist.rank() != 1 or stop > start:
            pieces[name] = Piece(flat[start:stop], start, SHAPES[name])
    tensors = {"model": pieces, "random": random_state()}
    tensors["topology"] = {"history": torch.arange(5) + step} if dist.rank() == 2 else {}
    tensors["optimizer"] = {"whole": torch.full((4, 4), float(step))} if dist.is_main() else {}
    return tensors


def check_content(found, world_size=4):
    """Every tensor, and any range of it, is what ``groups`` gave."""
    assert found.world_size == world_size, found.world_size
    assert found.names("model") == set(SHAPES)
    for name, shape in SHAPES.items():
        expected = whole(found.step, name)
        assert found.shape("model", name) == shape
        got = found.tensor("model", name)
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name
        size = expected.numel()
        for start in range(size + 1):
            for stop in range(start, size + 1, 1 + size // 20):
                assert torch.equal(found.read("model", name, start, stop), expected.view(-1)[start:stop])
    assert torch.equal(found.tensor("topology", "history"), torch.arange(5) + found.step)
    assert torch.equal(found.tensor("optimizer", "whole"), torch.full((4, 4), float(found.step)))
    assert {f"{rank}.torch" for rank in range(world_size)} <= found.names("random")


def listed(root):
    return sorted(path.name for path in root.iterdir())


class Ranks:
    """The cases; each method runs on all ranks."""

    def __init__(self, folder):
        self.folder = folder
        self.store = CheckpointStore(folder / "checkpoints", keep_last=3)
        self.seen = {}

    def refused(self, name, action):
        try:
            action()
        except UserError as error:
            self.seen[name] = str(error)
        else:
            raise AssertionError(f"{name}: not refused")
        dist.gather(None)
        assert not [n for n in listed(self.store.root) if n.startswith(".")], listed(self.store.root)

    def four(self):
        """Save, load, and every fault that leaves the ranks alive; the test saved step 10 by itself before."""
        found = resolve("auto", self.store.root, print)
        assert (found.step, found.world_size) == (10, 1)
        assert torch.equal(found.read("model", "matrix", 3, 50), whole(10, "matrix").view(-1)[3:50])
        self.random_state(found)
        check_content(self.store.load(self.store.save(20, groups(20), {"rank": dist.rank()}, best=True)))
        self.store.save(30, groups(30), {"rank": dist.rank()})
        self.one_rank_cannot_write()
        self.defects()
        found = self.store.newest(print)
        assert (found.step, found.state) == (30, {"rank": 0}), (found.step, found.state)
        check_content(found)
        self.damage()
        self.not_shared()

    def random_state(self, found):
        """A rank that was not there is seeded by (seed, rank, step); one that was goes on."""
        drawn = []
        for seed in (5, 6, 5):
            restore_random_state(found, seed)
            drawn.append([torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random(), random.gauss(0, 1)]])
        self.seen["random"] = drawn
        before = random_state()
        saved = self.store.load(self.store.save(11, groups(11), {}))
        torch.rand(3), np.random.rand(3), random.random()
        restore_random_state(saved, 0)
        assert all(torch.equal(tensor.nan_to_num(), before[n].nan_to_num()) for n, tensor in random_state().items())

    def one_rank_cannot_write(self):
        if dist.rank() == 2:
            old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, old[1]))  # Python ignores SIGXFSZ
        self.refused("file size", lambda: self.store.save(40, groups(40), {}))
        if dist.rank() == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        if os.geteuid() == 0:  # root is allowed everything
            os.seteuid(NOBODY if dist.rank() == 1 else 0)
            self.refused("permission", lambda: self.store.save(40, groups(40), {}))
            os.seteuid(0)

    def defects(self):
        """What is the program's fault ends all ranks too, and at once."""
        held = groups(40)
        if dist.rank() == 3:
            del held["model"]["cube"], held["model"]["matrix"]
        self.refused("gap", lambda: self.store.save(40, held, {}))
        twice = groups(40) | {"topology": {"history": torch.arange(5)}}
        self.refused("twice", lambda: self.store.save(40, twice, {}))
        no_json = {"value": object()} if dist.is_main() else {}
        try:
            self.store.save(40, groups(40), no_json)
        except (UserError, TypeError) as error:
            self.seen["defect"] = f"{type(error).__name__}: {error}"

    def damage(self):
        """One bit in a file of rank 3: all take the checkpoint before, and rank 0 alone tells."""
        path = self.store.save(50, groups(50), {}) / "model-rank-00003.safetensors"
        if dist.is_main():
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        dist.gather(None)
        told = []
        assert self.store.newest(told.append).step == 30
        self.seen["told"] = told
        self.refused("damaged", lambda: resolve(str(path.parent), self.store.root, print))

    def not_shared(self):
        check_shared(self.folder / "new" / "run")
        assert not (self.folder / "new").exists()
        shared.WAIT_S = 0.3
        own = self.folder / f"node{dist.rank()}"
        own.mkdir()
        self.refused("start", lambda: check_shared(own / "run"))
        store = CheckpointStore(own, 1)
        self.refused("save", lambda: store.save(1, groups(1), {}))
        (own / ".step-00000001.new").mkdir()  # as if something were there
        self.refused("hidden", lambda: store.save(1, groups(1), {}))
        self.seen["own"] = listed(own)

    def load(self):
        """By another number of ranks, and saved again by it."""
        found = resolve(str(self.folder), self.folder / "checkpoints", print)
        check_content(found)
        names = sorted(SHAPES)[dist.rank() :: dist.world_size()]
        tensors = {name: found.tensor("model", name) for name in names}
        path = CheckpointStore(self.folder / "again", 1).save(found.step, {"model": tensors}, found.state)
        self.seen["files"] = listed(path)

    def killed(self):
        """Rank KILL_RANK dies while it is in the function KILL_AT of a save."""
        self.store.save(10, groups(10), {})
        original = getattr(checkpoint, os.environ["KILL_AT"])

        def kill(path, *arguments):
            if dist.rank() == int(os.environ["KILL_RANK"]):
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, *arguments)

        setattr(checkpoint, os.environ["KILL_AT"], kill)
        self.store.save(20, groups(20), {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, place = sys.argv[1], Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    dist.open_control(60)
    ranks = Ranks(place)
    getattr(ranks, case)()
    (place / f"seen-{dist.rank()}.json").write_text(json.dumps(ranks.seen))
    torch.distributed.destroy_process_group()
