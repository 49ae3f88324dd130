"""Packed masks: exact both ways, in numpy's little bit order, with a digest that sees every link."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.topology.bits import PackedMasks, decode, digest, encode, fingerprint, pack, packed_size, unpack


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


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 2**31))
def test_coded_gaps_are_exact_and_never_longer_than_bits(size, density, seed):
    flipped = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density**3  # mostly few
    code = encode(flipped)
    assert code.dtype == torch.uint8
    assert len(code) <= packed_size(size)
    assert torch.equal(decode(code, size), flipped)


@pytest.mark.parametrize("places", [[], [0], [254], [255], [256], [509, 510, 511, 999], [5, 260, 515]])
def test_gaps_around_255(places):
    flipped = torch.zeros(1000, dtype=torch.bool)
    flipped[places] = True
    assert torch.equal(decode(encode(flipped), 1000), flipped)
    first = places[0] if places else None
    assert encode(flipped).tolist()[:1] == ([] if first is None else [min(first, 255)])


def test_a_fingerprint_sees_a_flipped_bit_and_a_swap():
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.2
    seen = {fingerprint(mask)}
    for place in range(0, 1200, 7):
        other = mask.clone()
        other.view(-1)[place] ^= True
        seen.add(fingerprint(other))
    seen.add(fingerprint(mask.flip(0)))
    assert len(seen) == len(range(0, 1200, 7)) + 2
    assert fingerprint(mask.clone()) == fingerprint(mask)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_packed_masks_are_transposed_by_name(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {f"layer.{i}": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    turned = PackedMasks.of(masks.items()).transposed({"layer.0", "layer.9"})
    assert list(turned) == list(masks)
    assert torch.equal(turned["layer.0"], masks["layer.0"].T)
    assert all(torch.equal(turned[name], masks[name]) for name in masks if name != "layer.0")
    assert turned.shapes["layer.0"] == tuple(reversed(shapes[0]))
