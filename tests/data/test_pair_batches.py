"""Batches by tokens: the budget, every pair once, one global batch for any number of ranks, resuming."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.data.pair_batches import HeldOut, PairTokens, TokenBatches, by_length, cut
from llm_cht.data.pair_store import GrowingArray, PairStore, PairWriter

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=40)
PAD = 0


def stored(lengths: list[tuple[int, int]], folder: Path | None = None) -> PairStore:
    """Pair n has the source tokens n * 20 + 1, n * 20 + 2, ... and the target tokens of minus these plus 10 ** 5."""
    with tempfile.TemporaryDirectory() as scratch:
        writer = PairWriter(Path(folder or scratch, "pairs"), (10**5, 10**6))
        for number, pair in enumerate(lengths):
            for side, length in enumerate(pair):
                tokens = number * 20 + np.arange(1, length + 1)
                writer.add([10**5 - tokens if side else tokens], np.array([length]), side)
        writer.close()
        return PairStore(Path(folder or scratch, "pairs"))


def rows(part: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each row that has labels."""
    found = []
    for source, mask, target in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
        assert (source[mask == 0] == PAD).all()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        if (target != -100).any():
            found.append((source[mask == 1].tolist(), target[target != -100].tolist()))
    return found


def test_tensors_by_hand(tmp_path):
    store = stored([(1, 2), (3, 1)], tmp_path)
    tensors = store.tensors(np.array([1, 0]), pad=7)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(tensors, torch.int64)
    assert tensors["input_ids"].tolist() == [[21, 22, 23], [1, 7, 7]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert tensors["labels"].tolist() == [[99979, -100], [99999, 99998]]
    assert store.tokens(1, 0).tolist() == [21, 22, 23]


@pytest.mark.parametrize("kind", ["uint16", "int32", "int64"])
def test_an_array_grows_on_disk(tmp_path, kind):
    array = GrowingArray(tmp_path / "a.npy", np.dtype(kind))
    for first in (0, 3, 3, 10**4):
        array.append(np.arange(first, dtype=np.int64))
    array.close()
    found = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert found.dtype == kind
    assert found.tolist() == [*range(3), *range(3), *range(10**4)]


def test_cut_by_hand():
    sources, targets = np.array([2, 2, 3, 5]), np.array([2, 3, 2, 5])
    order = np.array([0, 1, 2, 3])
    assert [batch.tolist() for batch in cut(order, sources, targets, 10)] == [[0, 1], [2], [3]]
    assert [batch.tolist() for batch in cut(order, sources, targets, 18)] == [[0, 1, 2], [3]]
    assert [batch.tolist() for batch in cut(order, sources, targets, 40)] == [[0, 1, 2, 3]]
    assert [batch.tolist() for batch in cut(order, sources, targets, 1)] == [[0], [1], [2], [3]]


def test_order_by_length_by_hand():
    sources, targets = np.array([4, 1, 4, 2, 3, 5]), np.array([1, 4, 4, 2, 3, 1])
    assert by_length(sources, targets).tolist() == [3, 4, 1, 2, 0, 5]  # 2 | 3 | 4: -3, 0, 3 | 5


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(24, 120), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_holds_every_pair_once_within_the_budget(lengths, budget, seed, epoch):
    batches = TokenBatches(stored(lengths), PAD, budget, seed)
    found = batches.epoch(epoch)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for batch in found:
        sources, targets = zip(*(lengths[number] for number in batch), strict=True)
        assert len(batch) * (max(sources) + max(targets)) <= budget
    assert len(batches) == len(batches.epoch(0))
    again = TokenBatches(stored(lengths), PAD, budget, seed).epoch(epoch)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in found]
    assert 0 <= batches.padding() < 1


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(24, 200), st.sampled_from([(1, 2), (2, 1), (2, 3), (3, 1), (3, 2)]))
def test_the_global_batch_is_the_same_for_any_ranks_and_passes(lengths, budget, layout):
    world, passes = layout
    store = stored(lengths)
    whole = TokenBatches(store, PAD, budget, 5)
    ranks = [TokenBatches(store, PAD, budget, 5) for _ in range(world)]
    for _ in range(len(whole) + 1):
        (part,), tokens = whole.next(0, 1, 1)
        expected = rows(part)
        assert part["input_ids"].shape[0] == tokens.pairs == len(expected)
        dealt = [batches.next(rank, world, passes) for rank, batches in enumerate(ranks)]
        assert all(told == tokens for _, told in dealt)
        parts = list(itertools.chain.from_iterable(own for own, _ in dealt))
        assert len(parts) == world * passes
        assert sorted(itertools.chain.from_iterable(map(rows, parts))) == sorted(expected)
        sizes = [sum(map(len, map(rows, own))) for own, _ in dealt]
        assert max(sizes) - min(sizes) <= passes
        for own in parts:
            if not rows(own):  # a part without a row of its own
                assert own["input_ids"].shape[0] == 1
                assert own["attention_mask"].sum() > 0
        assert tokens.source == sum(len(source) for source, _ in expected)
        assert tokens.target == sum(len(target) for _, target in expected)
        assert tokens.source_squares == sum(len(source) ** 2 for source, _ in expected)
        assert tokens.target_squares == sum(len(target) ** 2 for _, target in expected)
        assert tokens.products == sum(len(source) * len(target) for source, target in expected)


def test_a_part_without_rows_by_hand(tmp_path):
    batches = TokenBatches(stored([(2, 3)], tmp_path), PAD, 5, 0)
    (part,), tokens = batches.next(1, 2, 1)
    assert part["input_ids"].tolist() == [[1, 2]]
    assert part["labels"].tolist() == [[-100] * 3]
    assert tokens == PairTokens(1, 2, 3, 4, 9, 6)


@settings(deadline=None, max_examples=20)
@given(LENGTHS, st.integers(24, 120), st.integers(0, 12))
def test_resume_goes_on_with_the_very_next_batch(lengths, budget, done):
    store = stored(lengths)
    unbroken = TokenBatches(store, PAD, budget, 3)
    for _ in range(done):
        unbroken.next(0, 1, 1)
    state = unbroken.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed = TokenBatches(store, PAD, budget, 3)
    resumed.load_state_dict(state)
    for _ in range(8):
        first, second = unbroken.next(0, 1, 1), resumed.next(0, 1, 1)
        assert first[1] == second[1]
        assert all(torch.equal(first[0][0][name], second[0][0][name]) for name in first[0][0])
    assert unbroken.state_dict() == resumed.state_dict()


def test_epochs_and_seeds_differ_and_batches_are_shuffled():
    draw = np.random.RandomState(0)
    store = stored([(int(length), int(length)) for length in draw.randint(2, 12, 400)])
    batches = TokenBatches(store, PAD, 100, 0)
    epochs = [[batch.tolist() for batch in batches.epoch(number)] for number in (0, 1)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [batch.tolist() for batch in TokenBatches(store, PAD, 100, 1).epoch(0)]
    longest = [max(store.lengths[0][batch]) for batch in batches.epoch(0)]
    assert longest != sorted(longest)
    assert batches.padding() < 0.15


@settings(deadline=None, max_examples=20)
@given(LENGTHS, st.integers(1, 120))
def test_held_out_pairs_come_once_within_the_budget(lengths, budget):
    texts = [str(number) for number in range(len(lengths))]
    held = HeldOut(stored(lengths), PAD, (texts, texts))
    found = list(held.batches(budget))
    assert len(held) == len(held.sources) == len(held.references) == len(lengths)
    firsts = sorted(int(row[0]) for batch in found for row in batch["input_ids"])
    assert firsts == [number * 20 + 1 for number in range(len(lengths))]
    for batch in found:
        count, source = batch["input_ids"].shape
        assert count == 1 or count * (source + batch["labels"].shape[1]) <= budget
    again = list(held.batches(budget))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(found, again, strict=True))
