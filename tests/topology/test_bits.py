"""Packed masks: exact both ways, in numpy's little bit order, with a digest that sees every link."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.topology.bits import digest, pack, unpack


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 2**31))
def test_packing_is_exact(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
    assert torch.equal(unpack(packed, shape), mask)


def test_bit_order_and_padding():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = True
    assert pack(mask).tolist() == [2, 1]
    assert pack(mask.T).tolist() == [8, 1]  # rows of what is given, whatever its strides


def test_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError):
        unpack(torch.zeros(2, dtype=torch.uint8), (4, 2))


def test_digest_sees_names_shapes_and_links_but_not_the_order():
    masks = {"a": torch.eye(4, dtype=torch.bool), "b": torch.ones(2, 3, dtype=torch.bool)}
    same = {"b": masks["b"].clone(), "a": masks["a"].clone()}
    moved = masks["a"].clone()
    moved[0] = moved[0].roll(1)
    others = [
        {"a": masks["a"]},
        {"a": masks["a"], "c": masks["b"]},
        {"a": masks["a"], "b": masks["b"].T},
        {"a": moved, "b": masks["b"]},
    ]
    assert digest(masks) == digest(same)
    assert len({digest(masks), *map(digest, others)}) == 5
    assert digest({"a": masks["a"]}) == "5fac2ff1c43d37e8dcfdf1eed69f6b104c8dded1ddee164a17418a28b3652461"
