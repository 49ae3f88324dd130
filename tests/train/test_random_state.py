"""The generators go on where they were; ranks that are new stand in test_checkpoint_ranks.py."""

import random

import numpy as np
import pytest
import torch

from llm_cht.train.checkpoint import CheckpointStore
from llm_cht.train.random_state import random_state, restore_random_state

SAVED_BY_FORMAT_1 = {  # names and values as they were then; one process only
    "tensors": lambda: {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(np.random.get_state()[1], dtype=np.int64)),
        "python": torch.tensor(random.getstate()[1]),
    },
    "values": lambda: {
        "numpy": [np.random.get_state()[0], *np.random.get_state()[2:]],
        "python": [random.getstate()[0], random.getstate()[2]],
    },
}


def draws():
    cuda = torch.rand(3, device="cuda").tolist() if torch.cuda.is_available() else []
    return [torch.rand(3).tolist(), cuda, np.random.rand(3).tolist(), np.random.randn(), random.gauss(0, 1)]


@pytest.mark.parametrize("held", [0, 1], ids=["no normal held back", "one held back"])
def test_goes_through_a_checkpoint(tmp_path, held):
    np.random.seed(1)
    random.seed(1)
    for _ in range(held):
        draws()  # an odd number of normals: both generators hold one back
    store = CheckpointStore(tmp_path, 1)
    path = store.save(1, {"random": random_state()}, {})
    expected = draws() + draws()
    restore_random_state(store.load(path), seed=0)
    assert draws() + draws() == expected


@pytest.mark.parametrize("held", [0, 1])
def test_format_1(tmp_path, held):
    np.random.seed(1)
    random.seed(1)
    for _ in range(held):
        draws()
    store = CheckpointStore(tmp_path, 1)
    path = store.save(1, {"random": SAVED_BY_FORMAT_1["tensors"]()}, {"random": SAVED_BY_FORMAT_1["values"]()})
    torch_, _, *others = draws()
    restore_random_state(store.load(path), seed=0)
    again, _, *others_again = draws()
    assert (again, others_again) == (torch_, others)
