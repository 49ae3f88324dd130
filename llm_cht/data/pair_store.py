"""Encoded sentence pairs on disk: written once, opened memory-mapped.

Each side is one line of token numbers without padding, two bytes a token where the vocabulary allows, and the place
where each sentence ends. Arrow files, as for text, were left out: two columns that are always read together by number
need no more than two arrays each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
_SIDES = ("source", "target")


@dataclass
class PairCounts:
    """What became of the pairs of one split."""

    read: int = 0
    kept: int = 0
    dropped_empty: int = 0
    """a side without text"""
    dropped_long: int = 0
    """a side above `pairs.max_length`"""
    dropped_ratio: int = 0
    """sides whose lengths differ by more than `pairs.max_ratio`"""
    dropped_shared: int = 0
    """also in validation or test"""
    source_tokens: int = 0
    """of the kept pairs, end tokens included"""
    target_tokens: int = 0


class PairStore:
    """Pairs by number; a side is 0 (source) or 1 (target)."""

    def __init__(self, folder: Path) -> None:
        self._ids = [np.load(folder / f"{side}.npy", mmap_mode="r") for side in _SIDES]
        ends = [np.load(folder / f"{side}_ends.npy") for side in _SIDES]
        self._starts = [np.concatenate([[0], end[:-1]]) for end in ends]
        self.lengths = [np.diff(end, prepend=0) for end in ends]
        """tokens of each source, and of each target, end token included"""

    def __len__(self) -> int:
        return len(self.lengths[0])

    def tokens(self, number: int, side: int) -> np.ndarray:
        """Of one sentence."""
        start = self._starts[side][number]
        return self._ids[side][start : start + self.lengths[side][number]]

    def tensors(self, numbers: np.ndarray, pad: int) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (pairs, longest source), ``labels`` (pairs, longest target), int64.

        Padding is ``pad`` in the inputs and -100 in the labels.
        """
        sources, real = self._padded(numbers, 0, pad)
        labels, _ = self._padded(numbers, 1, IGNORED)
        arrays = {"input_ids": sources, "attention_mask": real.astype(np.int64), "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _padded(self, numbers: np.ndarray, side: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths[side][numbers]
        places = np.arange(lengths.max())
        real = places < lengths[:, None]
        array = np.full(real.shape, filler, dtype=np.int64)
        array[real] = self._ids[side][(self._starts[side][numbers][:, None] + places)[real]]
        return array, real


class PairWriter:
    """Writes a ``PairStore`` into ``folder``, piece by piece."""

    def __init__(self, folder: Path, sizes: tuple[int, int]) -> None:
        folder.mkdir()
        kinds = [np.dtype("uint16" if size <= 2**16 else "int32") for size in sizes]
        self._ids = [GrowingArray(folder / f"{side}.npy", kind) for side, kind in zip(_SIDES, kinds, strict=True)]
        self._ends = [GrowingArray(folder / f"{side}_ends.npy", np.dtype("int64")) for side in _SIDES]
        self._tokens = [0, 0]

    def add(self, tokens: list[np.ndarray], lengths: np.ndarray, side: int) -> None:
        """Take sentences of one side."""
        self._ids[side].append(np.concatenate(tokens) if tokens else np.zeros(0))
        ends = np.cumsum(lengths) + self._tokens[side]
        self._ends[side].append(ends)
        self._tokens[side] += int(lengths.sum())

    def close(self) -> None:
        """End the files."""
        for array in (*self._ids, *self._ends):
            array.close()


class GrowingArray:
    """An array of one dimension in a `.npy` file, written from front to back."""

    def __init__(self, path: Path, kind: np.dtype) -> None:
        self._file = path.open("wb")
        self._kind, self._length = kind, 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        """Write ``values`` behind what there is."""
        self._file.write(values.astype(self._kind).tobytes())
        self._length += len(values)

    def close(self) -> None:
        """Say in the header how much there is."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        kind = np.lib.format.dtype_to_descr(self._kind)
        header = {"descr": kind, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)  # leaves room for a longer shape


def write_texts(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Keep sentences as they were read."""
    path.write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Sources and targets of ``write_texts``."""
    pairs = json.loads(path.read_text(encoding="utf-8"))
    return [source for source, _ in pairs], [target for _, target in pairs]
