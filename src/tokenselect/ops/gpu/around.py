"""What stands around the three operations, in one launch each where plain torch takes many.

Pooled queries before the vote, the slots of all attended tokens after it, and how alike two queries are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import has_halves, on_device, overlap
from tokenselect.ops.gpu.device_code import after_predecessor, first_slot, load_halves, load_rotated, slots_of
from tokenselect.ops.paging import PageTable

_POOLED_AT_ONCE = 128
_SLOTS_AT_ONCE = 512


@triton.jit
def average_rotated(
    queries, bounds, cos, sin, out,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HALVES: tl.constexpr,
    AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, num_q_heads]: the mean of a block's queries, each rotated by its place in the block."""
    after_predecessor(OVERLAP)
    block, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first = tl.load(bounds + 2 * block)
    own = (tl.load(bounds + 2 * block + 1) - first).to(tl.int32)
    lane = tl.arange(0, AT_ONCE)
    here = out + (block * heads + head) * D
    if HALVES:
        h = tl.arange(0, HALF)
        total, total_2 = tl.zeros([AT_ONCE, HALF], tl.float32), tl.zeros([AT_ONCE, HALF], tl.float32)
        for start in range(0, own, AT_ONCE):
            i = start + lane
            rows = queries + ((first + i) * heads + head) * D
            a, b = load_halves(rows, cos, sin, i, h, i < own, HALF)
            total += a
            total_2 += b
        tl.store(here + h, tl.sum(total, axis=0) / own)
        tl.store(here + HALF + h, tl.sum(total_2, axis=0) / own)
    else:
        d = tl.arange(0, DP)
        total = tl.zeros([AT_ONCE, DP], tl.float32)
        for start in range(0, own, AT_ONCE):
            i = start + lane
            rows = queries + ((first + i) * heads + head) * D
            total += load_rotated(rows, cos, sin, i, d, i < own, D, HALF, INTERLEAVED)
        tl.store(here + d, tl.sum(total, axis=0) / own, mask=d < D)


def pool_queries(
    queries: Tensor, blocks: Sequence[tuple[int, int]], cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """See `ops.reference.pool_queries`."""
    if all(end - start == 1 for start, end in blocks) and len(blocks) == queries.shape[0]:
        return queries  # scoring takes them in any type
    (_, heads, dim), half = queries.shape, cos.shape[1]
    out = torch.empty((len(blocks), heads, dim), dtype=torch.float32, device=queries.device)
    bounds = on_device([at for block in blocks for at in block], queries.device)
    average_rotated[len(blocks), heads](
        queries.contiguous(), bounds, cos.contiguous(), sin.contiguous(), out,
        D=dim, DP=max(16, triton.next_power_of_2(dim)), HALF=half, INTERLEAVED=interleaved,
        HALVES=has_halves(dim, half, interleaved), AT_ONCE=_POOLED_AT_ONCE, num_warps=16, **overlap(queries.device),
    )  # fmt: skip
    return out


@triton.jit
def write_slots(
    chosen, blocks, pages, padding, slots, page_size, page_stride, sinks, k, low,
    ONE_PAGE: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, pieces]: where a block's sinks, chosen tokens, and all from its window on lie in the cache."""
    after_predecessor(OVERLAP)
    own = blocks + 4 * tl.program_id(0)
    sequence, window = tl.load(own), tl.load(own + 1)
    begin, length = tl.load(own + 2), tl.load(own + 3)
    i = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    is_chosen = (i >= sinks) & (i < sinks + k)
    row = chosen + tl.program_id(0).to(tl.int64) * k
    position = tl.where(i < sinks, i, window + i - sinks - k)
    position = tl.where(is_chosen, tl.load(row + i - sinks, mask=is_chosen, other=0) + low, position)
    page_row = pages + sequence * page_stride
    start = first_slot(page_row, page_size, tl.load(padding + sequence), 0, ONE_PAGE)
    slot = slots_of(position, page_row, page_size, start, i < length, ONE_PAGE)
    tl.store(slots + begin + i, slot, mask=i < length)


def attended_slots(
    chosen: Tensor,
    pages: PageTable,
    sequences: Sequence[int],
    windows: Sequence[int],
    ends: Sequence[int],
    num_sinks: int,
) -> tuple[Tensor, list[int]]:
    """Rows of the cache that blocks attend: sinks, chosen tokens, and all from the window to the block's end.

    Args:
        chosen: [num_blocks, k] int64, from `topk_tokens`: offsets from the first token after the sinks.
        pages: where each sequence's tokens lie.
        sequences: of each block.
        windows: position at which each block's local window begins.
        ends: one past the position of each block's last query.
        num_sinks: first tokens, always attended.

    Returns:
        slots: [sum of attended] int64.
        start_loc: num_blocks + 1 numbers, where each block's slots begin.
    """
    k, device = chosen.shape[1], chosen.device
    lengths = [num_sinks + k + end - window for window, end in zip(windows, ends, strict=True)]
    start_loc = list(accumulate(lengths, initial=0))
    slots = torch.empty(start_loc[-1], dtype=torch.int64, device=device)
    rows = zip(sequences, windows, start_loc[:-1], lengths, strict=True)
    write_slots[len(lengths), triton.cdiv(max(lengths), _SLOTS_AT_ONCE)](
        chosen, on_device([at for row in rows for at in row], device), pages.pages, on_device(pages.padding, device),
        slots, pages.page_size, pages.pages.stride(0), num_sinks, k, num_sinks,
        ONE_PAGE=pages.pages.shape[1] == 1, AT_ONCE=_SLOTS_AT_ONCE, num_warps=4, **overlap(device),
    )  # fmt: skip
    return slots, start_loc


@triton.jit
def compare(now, then, out, SIZE: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr):
    """Grid [rows]: the least cosine of PARTS parts of SIZE values each."""
    after_predecessor(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * PARTS * SIZE
    least = 2.0
    i = tl.arange(0, AT_ONCE)
    for part in range(PARTS):
        a = tl.load(now + row + part * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
        b = tl.load(then + row + part * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
        norms = tl.maximum(tl.sum(a * a, axis=0) * tl.sum(b * b, axis=0), 1e-30)
        least = tl.minimum(least, tl.sum(a * b, axis=0) / tl.sqrt(norms))
    tl.store(out + tl.program_id(0), least)


def least_cosine(now: Tensor, then: Tensor, parts: int) -> Tensor:
    """How alike queries are: the least cosine of their parts.

    Args:
        now: [rows, num_q_heads, head_dim].
        then: same shape.
        parts: that the heads of a row are cut into: KV heads, or 1.

    Returns:
        [rows] float32.
    """
    out = torch.empty(now.shape[0], dtype=torch.float32, device=now.device)
    size = now.shape[1] * now.shape[2] // parts
    compare[now.shape[0],](
        now.contiguous(), then.contiguous(), out,
        SIZE=size, AT_ONCE=triton.next_power_of_2(size), PARTS=parts, num_warps=4, **overlap(now.device),
    )  # fmt: skip
    return out
