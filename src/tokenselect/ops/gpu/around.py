"""What stands around the three operations, in one launch each where plain torch takes many.

Pooled queries and integer keys before the vote, the slots of all attended tokens after it, and how alike two queries
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import has_halves, on_device, on_host, overlap
from tokenselect.ops.gpu.device_code import after_predecessor, first_slot, load_halves, load_rotated, slots_of
from tokenselect.ops.paging import PageTable

_POOLED_AT_ONCE = 128
_SLOTS_AT_ONCE = 512
_QUANTIZED_AT_ONCE = 32


@triton.jit
def average_rotated(
    queries, starts, counts, cos, sin, out,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HALVES: tl.constexpr,
    AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, num_q_heads]: the mean of a block's queries, each rotated by its place in the block."""
    after_predecessor(OVERLAP)
    block, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first = tl.load(starts + block)
    own = tl.load(counts + block).to(tl.int32)
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
    queries: Tensor, starts: Tensor, counts: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """See `ops.reference.pool_queries`; a batch of single queries comes back as it is."""
    (num_queries, heads, dim), half = queries.shape, cos.shape[1]
    is_known_single = num_queries == starts.shape[0] and on_host(starts) == list(range(num_queries))
    if is_known_single and max(on_host(counts)) == 1:
        return queries  # scoring takes them in any type
    out = torch.empty((starts.shape[0], heads, dim), dtype=torch.float32, device=queries.device)
    average_rotated[starts.shape[0], heads](
        queries.contiguous(), starts, counts, cos.contiguous(), sin.contiguous(), out,
        D=dim, DP=max(16, triton.next_power_of_2(dim)), HALF=half, INTERLEAVED=interleaved,
        HALVES=has_halves(dim, half, interleaved), AT_ONCE=_POOLED_AT_ONCE, num_warps=16, **overlap(queries.device),
    )  # fmt: skip
    return out


@triton.jit
def quantize(
    rows, center, integers, scales, num_rows, row_stride, head_stride,
    D: tl.constexpr, DP: tl.constexpr, HAS_CENTER: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [pieces of AT_ONCE rows, num_kv_heads]: integers and scales of vectors counted from a center."""
    after_predecessor(OVERLAP)
    head, heads = tl.program_id(1), tl.num_programs(1)
    i = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    d = tl.arange(0, DP)
    mask = (i < num_rows)[:, None] & (d < D)[None, :]
    own = rows + i.to(tl.int64)[:, None] * row_stride + head.to(tl.int64) * head_stride + d[None, :]
    x = tl.load(own, mask=mask, other=0.0).to(tl.float32)
    if HAS_CENTER:
        x -= tl.load(center + head * D + d, mask=d < D, other=0.0)[None, :]
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) / 127
    x = tl.minimum(tl.maximum(x / scale[:, None], -127.0), 127.0)
    rounded = tl.where(x < 0, -tl.floor(0.5 - x), tl.floor(x + 0.5)).to(tl.int8)
    place = i.to(tl.int64) * heads + head
    tl.store(integers + place[:, None] * D + d[None, :], rounded, mask=mask)
    tl.store(scales + place, scale, mask=i < num_rows)


def quantize_rows(rows: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `ops.reference.quantize_rows`."""
    count, heads, dim = rows.shape
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    integers = torch.empty((count, heads, dim), dtype=torch.int8, device=rows.device)
    scales = torch.empty((count, heads), dtype=torch.float32, device=rows.device)
    if count:
        quantize[triton.cdiv(count, _QUANTIZED_AT_ONCE), heads](
            rows, rows if center is None else center.contiguous(), integers, scales, count,
            rows.stride(0), rows.stride(1), D=dim, DP=triton.next_power_of_2(dim), HAS_CENTER=center is not None,
            AT_ONCE=_QUANTIZED_AT_ONCE, num_warps=4, **overlap(rows.device),
        )  # fmt: skip
    return integers, scales


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
    rows = zip(sequences, windows, start_loc[:-1], lengths, strict=True)
    blocks = on_device([at for row in rows for at in row], device)
    return slots_to_attend(chosen, pages, blocks, start_loc[-1], num_sinks, max(lengths)), start_loc


def slots_to_attend(
    chosen: Tensor, pages: PageTable, blocks: Tensor, total: int, num_sinks: int, longest: int | None = None
) -> Tensor:
    """`attended_slots` where the device knows the blocks.

    Args:
        chosen: [num_blocks, k] int64.
        pages: where each sequence's tokens lie.
        blocks: [4 * num_blocks] int64; of each its sequence, window, where its slots begin and how many it has.
        total: slots of all blocks.
        num_sinks: first tokens, always attended.
        longest: the most slots of a block; `total` where not given.

    Returns:
        [total] int64.
    """
    device = chosen.device
    slots = torch.empty(total, dtype=torch.int64, device=device)
    write_slots[chosen.shape[0], triton.cdiv(total if longest is None else longest, _SLOTS_AT_ONCE)](
        chosen, blocks, pages.pages, on_device(pages.padding, device),
        slots, pages.page_size, pages.pages.stride(0), num_sinks, chosen.shape[1], num_sinks,
        ONE_PAGE=pages.pages.shape[1] == 1, AT_ONCE=_SLOTS_AT_ONCE, num_warps=4, **overlap(device),
    )  # fmt: skip
    return slots


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
