"""Root mean square norm in one launch, where a host's layer takes eight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import overlap
from tokenselect.ops.gpu.device_code import after_predecessor

_PER_WARP = 512


@triton.jit
def normalise(x, weight, out, epsilon, SIZE: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr):
    """Grid [rows]: one row, rounded where the hosts' own norms round: before the weight, and after it."""
    after_predecessor(OVERLAP)
    i = tl.arange(0, PADDED)
    place = tl.program_id(0).to(tl.int64) * SIZE + i
    row = tl.load(x + place, mask=i < SIZE, other=0.0).to(tl.float32)
    unit = 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / SIZE + epsilon)
    w = tl.load(weight + i, mask=i < SIZE, other=0.0)
    scaled = (row * unit).to(w.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out + place, scaled.to(w.dtype), mask=i < SIZE)


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * (x / sqrt(mean(x ** 2) + epsilon))` along the last dimension, in float32 and rounded as by Llama's own.

    Args:
        rows: [..., size].
        weight: [size] in the dtype of `rows`.
        epsilon: added to the mean of the squares.

    Returns:
        Like `rows`, contiguous.
    """
    rows, size = rows.contiguous(), weight.shape[0]
    out = torch.empty_like(rows)
    padded = triton.next_power_of_2(size)
    normalise[rows.numel() // size,](
        rows, weight, out, epsilon, SIZE=size, PADDED=padded,
        num_warps=max(1, min(16, padded // _PER_WARP)), **overlap(rows.device),
    )  # fmt: skip
    return out
