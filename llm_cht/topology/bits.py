"""Boolean masks as packed bits, for files; as gaps, for messages between ranks; and their digests.

Eight links a byte, the first in the lowest bit, rows one after the other; the last byte is filled up with zeros.
``numpy.packbits`` does the same, but this room knows torch only and the masks may live on a GPU.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llm_cht.topology.keys import Keys

_MORE = 255  # a gap of at least so many follows


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into uint8 of shape (ceil(n / 8),)."""
    flat = mask.reshape(-1).to(torch.uint8)
    packed = torch.zeros(packed_size(flat.numel()), dtype=torch.uint8, device=mask.device)
    for position in range(8):
        bit = flat[position::8]
        packed[: bit.numel()] |= bit << position
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo ``pack``: uint8 of shape (ceil(n / 8),) to a boolean tensor of ``shape`` with n entries."""
    size = math.prod(shape)
    assert packed.shape == (packed_size(size),), (packed.shape, shape)
    mask = torch.empty(size, dtype=torch.bool, device=packed.device)
    for position in range(8):
        bit = mask[position::8]
        bit.copy_((packed[: bit.numel()] >> position) & 1)
    return mask.view(*shape)


class PackedMasks(Mapping[str, Tensor]):
    """Masks by layer name, bool matrices, in an eighth of their memory: unpacked one by one, whenever asked for."""

    def __init__(self, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.packed = packed
        self.shapes = shapes

    @classmethod
    def of(cls, masks: Iterable[tuple[str, Tensor]]) -> "PackedMasks":
        """Pack ``masks`` as they come."""
        packed: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, mask in masks:
            packed[name], shapes[name] = pack(mask), (mask.shape[0], mask.shape[1])
        return cls(packed, shapes)

    def transposed(self, names: Collection[str]) -> "PackedMasks":
        """The same masks, in the same order, those of the layers ``names`` transposed."""
        turned = PackedMasks.of((name, self[name].T) for name in self if name in names)
        return PackedMasks(
            {name: turned.packed.get(name, packed) for name, packed in self.packed.items()},
            {**self.shapes, **turned.shapes},
        )

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self.packed[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def encode(flipped: Tensor) -> Tensor:
    """Code a boolean tensor, flat and mostly False, as uint8: the gaps between its True, or ``pack`` where shorter.

    A byte a gap, which is the number of False before a True; 255 means: 255 more, and read on. At two flips in a
    hundred positions that takes a sixth of the bits of ``pack``, a tenth more than the least possible.
    """
    places = flipped.nonzero().squeeze(1)
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    ends = (gaps // _MORE + 1).cumsum(0)
    length = int(ends[-1]) if len(ends) else 0
    if length >= packed_size(flipped.numel()):
        return pack(flipped)
    code = torch.full((length,), _MORE, dtype=torch.uint8, device=flipped.device)
    code[ends - 1] = (gaps % _MORE).to(torch.uint8)
    return code


def decode(code: Tensor, size: int) -> Tensor:
    """Undo ``encode`` for a tensor of ``size`` entries."""
    if len(code) == packed_size(size):
        return unpack(code, (size,))
    ends = (code != _MORE).nonzero().squeeze(1)
    places = code.to(torch.int64).cumsum(0)[ends] + torch.arange(len(ends), device=code.device)
    flipped = torch.zeros(size, dtype=torch.bool, device=code.device)
    flipped[places] = True
    return flipped


def packed_size(size: int) -> int:
    """Bytes of a packed mask of ``size`` entries."""
    return (size + 7) // 8


def fingerprint(mask: Tensor) -> int:
    """Return 63 bits that differ, but for chance, for masks that differ; cheap on every device, no cryptography."""
    packed = pack(mask).to(torch.int64)
    place = torch.arange(packed.numel(), device=packed.device)
    mixed = Keys(0, 0, "fingerprint").bits("", (place * 256 + packed) % 2**32) * (2 * place + 1)
    return int(mixed.sum()) & (2**63 - 1)


def digest(masks: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hex, of the names, shapes and links of ``masks``, whatever their order and device."""
    result = hashlib.sha256()
    for name in sorted(masks):
        result.update(repr((name, tuple(masks[name].shape))).encode())
        result.update(pack(masks[name]).cpu().numpy().tobytes())
    return result.hexdigest()
