"""Tensors in the files of many ranks: each writes what it holds, a reader takes any range of any of them.

    model.safetensors               rank 0
    model-rank-00001.safetensors    rank 1, if it holds something

A tensor is whole in one file, in its own shape, or in pieces: 1-D stretches of the flattened tensor, whose start and
shape stand in the metadata of their file (``pieces``: JSON, name to [start, shape]). Together they must be the tensor
exactly, none missing and none twice. So a reader needs to know nothing of who wrote: four ranks can read what two
have written, and a rank that needs 1/64 of the weights reads 1/64 of the bytes.

Rejected: gathering whole tensors on rank 0 (its memory and its disk for all), ``torch.distributed.checkpoint`` and
DeepSpeed's own files (pickle inside; the latter need a conversion to be read by another number of ranks).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_cht.errors import UserError

_FILE = re.compile(r"(?P<stem>.+?)(-rank-\d{5,})?\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``start + len(values) - 1`` of a flattened tensor of ``shape``."""

    values: Tensor
    """1-D"""
    start: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.values.dim() == 1, self.values.shape
        assert 0 <= self.start <= math.prod(self.shape) - len(self.values), (self.start, self.values.shape, self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.values.nbytes


Group = Mapping[str, Tensor | Piece]
"""what one rank holds, by name"""


def file_name(stem: str, rank: int) -> str:
    """Name of the file into which a rank writes a group."""
    return f"{stem}.safetensors" if rank == 0 else f"{stem}-rank-{rank:05d}.safetensors"


def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each group among ``names``, those of all ranks."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := _FILE.fullmatch(name):
            found.setdefault(match["stem"], []).append(name)
    return found


def write_group(path: Path, group: Group) -> None:
    """Write what this rank holds of a group."""
    placed = {name: [x.start, list(x.shape)] for name, x in group.items() if isinstance(x, Piece)}
    tensors = {name: x.values if isinstance(x, Piece) else x for name, x in group.items()}
    save_file(_storable(tensors), path, metadata={"pieces": json.dumps(placed)} if placed else None)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what safetensors refuses: tensors that are not contiguous, or lie in the storage of one before them."""
    result, storages = {}, set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        result[name] = stored
    return result


@dataclass(frozen=True)
class _Part:
    """Where a stretch of a tensor lies."""

    start: int
    stop: int
    path: Path
    kind: tuple[tuple[int, ...], str]
    """shape of the whole tensor, and type of its elements"""


class GroupReader:
    """The tensors of one group, out of the files of all ranks; opens them when first asked, and keeps none open."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)

    @cached_property
    def _parts(self) -> dict[str, list[_Part]]:
        """All parts of each tensor, in their order."""
        parts: dict[str, list[_Part]] = {}
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                placed = json.loads((file.metadata() or {}).get("pieces", "{}"))
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    view = file.get_slice(name)
                    stored = view.get_shape()
                    start, shape = placed.get(name, (0, stored))
                    kind = tuple(shape), view.get_dtype()
                    parts.setdefault(name, []).append(_Part(start, start + math.prod(stored), path, kind))
        return {name: sorted(found, key=lambda part: (part.start, part.stop)) for name, found in parts.items()}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._parts[name][0].kind[0]

    def check(self) -> None:
        """Look at every tensor's parts, not at their values.

        Raises:
            UserError: parts are missing, overlap or do not belong together.
        """
        for name in self._parts:
            self._covering(name, 0, math.prod(self.shape(name)))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop - 1`` of the flattened tensor, 1-D, on the CPU; nothing else is read.

        Raises:
            UserError: the parts do not cover them exactly.
        """
        size = math.prod(self.shape(name))
        stop = size if stop is None else stop
        assert 0 <= start <= stop <= size, (name, start, stop, size)
        found = [_read_part(name, *stretch) for stretch in self._covering(name, start, stop)]
        if not found:  # an empty range has a dtype too
            part = self._parts[name][0]
            return _read_part(name, part, part.start, part.start)
        return found[0] if len(found) == 1 else torch.cat(found)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape, on the CPU."""
        return self.read(name).view(self.shape(name))

    def _covering(self, name: str, start: int, stop: int) -> list[tuple[_Part, int, int]]:
        """Stretches of parts that follow each other from ``start`` to ``stop``."""
        kind, found, at = self._parts[name][0].kind, [], start
        for part in self._parts[name]:
            low, high = max(start, part.start), min(stop, part.stop)
            if part.kind != kind:
                raise self._misfit(name, f"{part.path.name} has it as {part.kind} and another file as {kind}")
            if low < high:
                if low != at:
                    raise self._misfit(
                        name, f"element {min(low, at)} is in {'two' if low < at else 'none'} of the files"
                    )
                found.append((part, low, high))
                at = high
        if at < stop:
            raise self._misfit(name, f"element {at} is in none of the files")
        return found

    def _misfit(self, name: str, fault: str) -> UserError:
        return UserError(
            f"the pieces of `{name}` in {self.paths[0].parent} are not that tensor: {fault}; this is a fault of "
            "llm-cht, please report it with this line"
        )


def _read_part(name: str, part: _Part, start: int, stop: int) -> Tensor:
    """Elements of a part, by their place in the whole tensor."""
    with safe_open(part.path, framework="pt") as file:
        view = file.get_slice(name)
        shape, first, last = view.get_shape(), start - part.start, stop - part.start
        width = math.prod(shape[1:])
        if not shape or width == 0:  # a scalar, or nothing at all
            return file.get_tensor(name).flatten()[first:last]
        row = first // width
        rows = view[row : -(-last // width)].flatten()  # a whole tensor is read by rows
        return rows[first - row * width : last - row * width]
