"""The order of training is a function of (seed, sample number) and drops nothing."""

import numpy as np
import pytest
import torch

from llm_cht.data.order import Batches, permutation


class Numbers:
    """Stands in for ``Sequences``: sequence n holds n."""

    def __len__(self) -> int:
        return 10

    def take(self, numbers):
        return {"input_ids": torch.from_numpy(numbers)}


def samples(seed: int, start: int, count: int) -> list[int]:
    return Batches(Numbers(), seed).batch(start, count)["input_ids"].tolist()


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [samples(3, 10 * epoch, 10) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs != [samples(4, 10 * epoch, 10) for epoch in range(4)]


@pytest.mark.parametrize("size", [1, 3, 7, 25])
def test_batches_of_any_size_make_the_same_line(size):
    batches = Batches(Numbers(), 3)
    line = [sample for start in range(0, 75, size) for sample in batches.batch(start, size)["input_ids"].tolist()]
    assert line == samples(3, 0, len(line))
    assert batches.batch(4, 3)["input_ids"].tolist() == line[4:7]  # back in time as well


def test_position_is_one_number():
    batches = Batches(Numbers(), 3)
    batches.batch(8, 4)
    other = Batches(Numbers(), 3)
    other.load_state_dict(batches.state_dict())
    assert other.state_dict() == {"next": 12}


def test_permutations_of_large_seeds_differ_and_never_change():
    assert permutation(0, 0, 8).tolist() == [2, 6, 0, 4, 1, 3, 5, 7]
    assert not np.array_equal(permutation(2**32, 0, 100), permutation(0, 0, 100))
