"""Tensors cut into pieces over several files: any cut reads back whole, and no wrong one goes unseen."""

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.errors import UserError
from llm_cht.train.pieces import GroupReader, Piece, by_stem, file_name, write_group

SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)


def written(folder, *groups):
    paths = [folder / file_name("model", rank) for rank in range(len(groups))]
    for path, group in zip(paths, groups, strict=True):
        write_group(path, group)
    return GroupReader(paths)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_any_cut_and_any_range(shape, data):
    size = math.prod(shape)
    place = st.integers(0, size)
    cuts = [0, *sorted(data.draw(st.lists(place, max_size=4))), size]
    start, stop = sorted(data.draw(st.tuples(place, place)))
    tensor = torch.arange(size).view(shape)
    pieces = [Piece(tensor.view(-1)[a:b], a, shape) for a, b in itertools.pairwise(cuts)]
    groups = [{"w": piece} for piece in data.draw(st.permutations(pieces))]
    groups[0]["whole"] = tensor
    with tempfile.TemporaryDirectory() as folder:
        reader = written(Path(folder), *groups)
        reader.check()
        assert reader.names() == {"w", "whole"}
        for name in reader.names():
            assert reader.shape(name) == shape
            assert torch.equal(reader.tensor(name), tensor)
            assert torch.equal(reader.read(name, start, stop), tensor.view(-1)[start:stop])


def piece(start, stop, shape=(3, 4), dtype=torch.float32):
    return {"w": Piece(torch.arange(start, stop, dtype=dtype), start, shape)}


@pytest.mark.parametrize(
    ("groups", "fault"),
    [
        ((piece(0, 5), piece(6, 12)), "element 5 is in none"),
        ((piece(1, 12),), "element 0 is in none"),
        ((piece(0, 5), piece(5, 11)), "element 11 is in none"),
        ((piece(0, 5), piece(4, 12)), "element 4 is in two"),
        ((piece(0, 12), piece(3, 4)), "element 3 is in two"),
        (({"w": torch.ones(3, 4)}, {"w": torch.ones(3, 4)}), "element 0 is in two"),
        ((piece(0, 5), piece(5, 12, (4, 3))), r"model-rank-00001.safetensors has it as \(\(4, 3\)"),
        ((piece(0, 5), piece(5, 12, dtype=torch.float64)), "F64"),
    ],
)
def test_pieces_that_are_not_the_tensor_are_refused(tmp_path, groups, fault):
    reader = written(tmp_path, *groups)
    for action in (reader.check, lambda: reader.tensor("w")):
        with pytest.raises(UserError, match=rf"pieces of `w`.*{fault}"):
            action()


def test_a_range_can_be_read_where_others_are_missing(tmp_path):
    reader = written(tmp_path, piece(0, 5), piece(6, 12))
    assert reader.read("w", 7, 12).tolist() == [7, 8, 9, 10, 11]


def test_pieces_beyond_their_tensor_cannot_be_made():
    for start, shape in ((-1, (4,)), (2, (4,)), (0, (2, 1))):
        with pytest.raises(AssertionError):
            Piece(torch.zeros(3), start, shape)


def test_files_by_group():
    names = [file_name("model", 0), file_name("model", 123456), file_name("a.b", 7), "state.json"]
    assert names[:3] == ["model.safetensors", "model-rank-123456.safetensors", "a.b-rank-00007.safetensors"]
    assert by_stem(names) == {"model": names[1::-1], "a.b": [names[2]]}
