"""Weights from disk to disk: every tensor edited in blocks of rows, written as safetensors, read again and compared.

The format is simple enough to be written as a stream: the size of the header, the header, which says where each tensor
will be, and the tensors. ``save_file`` of safetensors was rejected: it wants all tensors of a file in memory. Readers
are the library's, here and elsewhere, so that a file that it would not read is never left behind.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llm_cht.convert.source import FLOATS, INDEX, TYPES, WEIGHTS, Stored, read_headers
from llm_cht.errors import UserError

SHARD = 10**9
"""bytes of tensors in a file, unless one alone is larger"""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""what floats can be converted to, by torch's name, with that of safetensors"""


@dataclass(frozen=True)
class Edit:
    """What becomes of a tensor; nothing, unless said otherwise."""

    mask: Callable[[], Tensor] | None = None
    """makes the bool tensor, of the shape of the old one, off which it becomes 0"""
    rows: Tensor | None = None
    """which rows remain, bool"""
    columns: Tensor | None = None
    """which columns remain, bool"""

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what remains."""
        sizes = list(old)
        for axis, kept in enumerate((self.rows, self.columns)):
            if kept is not None:
                sizes[axis] = int(kept.count_nonzero())
        return tuple(sizes)

    def blocks(self, stored: Stored) -> Iterator[Tensor]:
        """The edited tensor, in parts."""
        mask = None if self.mask is None else self.mask()
        for begin, block in stored.blocks():
            end = begin + (len(block) if block.ndim else 0)
            if mask is not None:
                block.masked_fill_(~mask[begin:end], 0)
            if self.rows is not None:
                block = block[self.rows[begin:end]]
            yield block if self.columns is None else block[:, self.columns]


@dataclass(frozen=True)
class Written:
    """A tensor to be written."""

    stored: Stored
    edit: Edit
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return TYPES[self.dtype].itemsize * math.prod(self.shape)


def planned(tensors: Mapping[str, Stored], edits: Mapping[str, Edit], dtype: str | None) -> dict[str, Written]:
    """What is to be written: ``tensors`` after their ``edits``, floats as ``dtype`` (None: each as it was)."""
    plan = {}
    for name, stored in tensors.items():
        edit = edits.get(name, Edit())
        new = DTYPES[dtype] if dtype is not None and stored.dtype in FLOATS else stored.dtype
        plan[name] = Written(stored, edit, new, edit.shape(stored.shape))
    return plan


def write_shards(folder: Path, plan: Mapping[str, Written]) -> dict[str, str]:
    """Write the files of a checkpoint, and the index if they are several; returns a digest of each tensor.

    Raises:
        UserError: a number does not fit into its new type.
    """
    shards = _shared_out(plan)
    digests: dict[str, str] = {}
    index: dict[str, str] = {}
    with _bar("write", sum(one.stored.nbytes for one in plan.values())) as bar:
        for number, names in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            index |= dict.fromkeys(names, file)
            with open(folder / file, "wb") as out:
                out.write(_header({name: plan[name] for name in names}))
                for name in names:
                    digest = hashlib.sha256()
                    for part in _parts(name, plan[name]):
                        out.write(part)
                        digest.update(part)
                    digests[name] = digest.hexdigest()
                    bar.update(plan[name].stored.nbytes)
    if len(shards) > 1:
        about = {"metadata": {"total_size": sum(one.nbytes for one in plan.values())}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digests


def verify_shards(folder: Path, digests: Mapping[str, str]) -> None:
    """Read the tensors of a checkpoint again; ``UserError`` unless they are those that were written."""
    tensors = read_headers(folder)
    with _bar("verify", sum(stored.nbytes for stored in tensors.values())) as bar:
        for name, expected in digests.items():
            digest = hashlib.sha256()
            for _, block in tensors[name].blocks():
                digest.update(_as_bytes(block))
            if digest.hexdigest() != expected:
                raise UserError(f"`{name}` is not on disk as it was written; check the disk, then convert again")
            bar.update(tensors[name].nbytes)


def _shared_out(plan: Mapping[str, Written]) -> list[list[str]]:
    """Names of each file. Large elements come first, so that every tensor lies at a multiple of its element's size."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, one in plan.items():
        if shards[-1] and size + one.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += one.nbytes
    return [sorted(names, key=lambda name: -TYPES[plan[name].dtype].itemsize) for names in shards]


def _header(tensors: Mapping[str, Written]) -> bytes:
    about: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, one in tensors.items():
        about[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [place, place + one.nbytes]}
        place += one.nbytes
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(name: str, one: Written) -> Iterator[memoryview]:
    for block in one.edit.blocks(one.stored):
        if one.dtype == one.stored.dtype:
            yield _as_bytes(block)
            continue
        new = block.to(TYPES[one.dtype])
        if not torch.equal(new.isfinite(), block.isfinite()):
            largest = block[block.isfinite()].abs().max().item()
            raise UserError(f"`{name}` has numbers up to {largest:.4g}, too large for --dtype; take bfloat16")
        yield _as_bytes(new)


def _as_bytes(block: Tensor) -> memoryview:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
