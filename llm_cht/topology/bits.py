"""Boolean masks as packed bits, for files and for messages between ranks, and their digest.

Eight links a byte, the first in the lowest bit, rows one after the other; the last byte is filled up with zeros.
``numpy.packbits`` does the same, but this room knows torch only and the masks may live on a GPU.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm_cht.topology.keys import Keys


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into uint8 of shape (ceil(n / 8),)."""
    flat = mask.reshape(-1).to(torch.uint8)
    packed = torch.zeros((flat.numel() + 7) // 8, dtype=torch.uint8, device=mask.device)
    for position in range(8):
        bit = flat[position::8]
        packed[: bit.numel()] |= bit << position
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo ``pack``: uint8 of shape (ceil(n / 8),) to a boolean tensor of ``shape`` with n entries."""
    size = math.prod(shape)
    assert packed.shape == ((size + 7) // 8,), (packed.shape, shape)
    mask = torch.empty(size, dtype=torch.bool, device=packed.device)
    for position in range(8):
        bit = mask[position::8]
        bit.copy_((packed[: bit.numel()] >> position) & 1)
    return mask.view(*shape)


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
