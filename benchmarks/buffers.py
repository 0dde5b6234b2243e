"""Memory that operations read: random numbers, in so many copies that no read finds them in a cache.

The system may map it in huge pages, as it may the memory of the Transformers cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenselect.hardware import advise_huge_pages

POOL_BYTES = 128 << 20  # four times the last-level cache of the machine that the committed numbers are from
_HALVES_OF_ONE = 0x3F00  # bf16: sign and mantissa random, exponent that of 0.5


def num_copies(num_bytes: int) -> int:
    """How many buffers of so many bytes fill the pool."""
    return max(1, -(-POOL_BYTES // num_bytes))


def random_bf16(*shape: int) -> Tensor:
    """Numbers in +-[0.5, 1); made bit by bit, since gigabytes of normal ones would take minutes."""
    bits = _random_bytes(2, shape).view(torch.int16)
    bits.bitwise_and_(-0x7F81).bitwise_or_(_HALVES_OF_ONE)  # -0x7F81 = 0x807F: sign and mantissa
    return bits.view(torch.bfloat16).view(shape)


def random_int8(*shape: int) -> Tensor:
    """Integers in -127 .. 127."""
    return _random_bytes(1, shape).view(torch.int8).clamp_(min=-127).view(shape)


def _random_bytes(size: int, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel() * size
    numbers = advise_huge_pages(torch.empty(-(-count // 8), dtype=torch.int64))
    return numbers.random_(-(2**63), None).view(torch.uint8)[:count]


def as_rows(buffer: Tensor) -> Tensor:
    """[Hkv, T, D] as rows of a cache [T, Hkv, D], without a copy: how the Transformers cache lies in memory."""
    return buffer.transpose(0, 1)
