"""Counter-based random numbers: every draw is a pure function of (seed, update, layer, purpose, flat index).

So a mask depends neither on the device, nor on the number of ranks, nor on what was drawn before, and a resumed run
draws what the unbroken one would have drawn. ``torch.Generator`` was rejected: its stream differs between devices and
the value at one index depends on how many were drawn before it.

The names are hashed once, in Python, into three 32-bit round keys; an index then passes three rounds of "xor the round
key, multiply, fold the upper half of the product onto the lower". All numbers stay below 2**63, so that int64 never
overflows and every device computes the same bits; three rounds because after two a flipped bit of the index still
leaves a bias of half a percent in the output. Work goes in chunks that stay in the cache: on a CPU several times faster
than whole tensors.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x5BD1E995, 0x6C8E9CF5)  # odd, below 2**31
_LOW_32 = 0xFFFFFFFF
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Keys:
    """Random numbers of one layer at one topology update (update 0: the start of the run).

    ``purpose`` is a short label that separates the draws of one update; an ``index`` is the flat position in the layer.
    """

    seed: int
    update: int
    layer: str

    def bits(self, purpose: str, index: Tensor) -> Tensor:
        """Return uniform integers in [0, 2**32), int64, one per ``index`` (int64, any shape, values in [0, 2**32))."""
        result = torch.empty_like(index, memory_format=torch.contiguous_format)
        round_keys = self._round_keys(purpose)
        for source, target in _chunks(index, result):
            _hash(source, round_keys, target)
        return result

    def uniform(self, purpose: str, index: Tensor) -> Tensor:
        """Return fp32 numbers in (0, 1), one per ``index``; steps of 2**-32 near 0 and of 2**-24 near 1."""
        result = torch.empty_like(index, dtype=torch.float32, memory_format=torch.contiguous_format)
        round_keys = self._round_keys(purpose)
        for source, target in _chunks(index, result):
            target.copy_(_hash(source, round_keys, torch.empty_like(source)))
            target.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
        return result

    def below(self, purpose: str, index: Tensor, bound: int) -> Tensor:
        """Return whole numbers in [0, ``bound``), int64, one per ``index``; uniform up to ``bound`` / 2**32."""
        return self.bits(purpose, index).mul_(bound).bitwise_right_shift_(32)

    def gumbel(self, purpose: str, index: Tensor) -> Tensor:
        """Return fp32 standard Gumbel noise, always finite, one per ``index``.

        With V = ``uniform``, E = -log(1 - V) is exponential and -log(E) Gumbel: its upper tail, which decides what is
        sampled, comes from the V near 0, where they are finest.
        """
        result = self.uniform(purpose, index)
        for noise in result.view(-1).split(_CHUNK):
            noise.neg_().log1p_().neg_().log_().neg_()
        return result

    def normal(self, purpose: str, index: Tensor) -> Tensor:
        """Return fp32 standard normal numbers, at most 6.8 from 0, one per ``index``.

        Box and Muller: sqrt(-2 log V) cos(2 pi W). Small V, where they are finest, give the tails. The same on every
        device but for the rounding of log and cos.
        """
        result, angle = self.uniform(purpose, index), self.uniform(f"{purpose}/angle", index)
        for noise, turn in _chunks(angle, result):
            turn.log_().mul_(-2).sqrt_().mul_(noise.mul_(2 * math.pi).cos_())
        return result

    def _round_keys(self, purpose: str) -> tuple[int, ...]:
        name = repr((self.seed, self.update, self.layer, purpose)).encode()
        digest = hashlib.blake2b(name, digest_size=4 * len(_MULTIPLIERS)).digest()
        return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4))


def _chunks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(source.reshape(-1).split(_CHUNK), target.view(-1).split(_CHUNK), strict=True)


def _hash(index: Tensor, round_keys: tuple[int, ...], out: Tensor) -> Tensor:
    """Mix ``index`` into ``out`` (both int64)."""
    out.copy_(index)
    for key, multiplier in zip(round_keys, _MULTIPLIERS, strict=True):
        out.bitwise_xor_(key).mul_(multiplier)
        out.bitwise_xor_(out >> 32).bitwise_and_(_LOW_32)
    return out
