"""Copies of host memory's rows on a GPU, in three launches: find, make room, copy.

A kernel reads and writes pinned host memory by itself, row by row, so only what is missing crosses the bus and the host
need not know what that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import overlap
from tokenselect.ops.gpu.device_code import after_predecessor
from tokenselect.ops.resident import ABSENT

_FOUND_AT_ONCE = 256
_AT_HAND = 4096  # slots or rows that the one program which makes room holds
_ABSENT = tl.constexpr(ABSENT)


@triton.jit(do_not_specialize=["n"])
def find_rows(slots, places, used, now, n, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr):
    """Grid [pieces of AT_ONCE slots]: rows that are there are used now; of equal slots without one the first claims."""
    after_predecessor(OVERLAP)
    i = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    slot = tl.load(slots + i, mask=i < n, other=0)
    row = tl.load(places + slot, mask=i < n, other=0)
    tl.store(used + row, tl.load(now), mask=(i < n) & (row >= 0))
    tl.atomic_max(places + slot, -2 - i, mask=(i < n) & (row < 0), sem="relaxed")


@triton.jit
def _claims(slots, places, at, n, AT_HAND: tl.constexpr):
    """Of a piece of the slots those that need a row, each once."""
    i = at + tl.arange(0, AT_HAND)
    slot = tl.load(slots + i, mask=i < n, other=0)
    return i, slot, (i < n) & (tl.load(places + slot, mask=i < n, other=0) == -2 - i)


@triton.jit
def _used(used, at, num_rows, AT_HAND: tl.constexpr):
    """When a piece of the rows was used; outside, later than any."""
    r = at + tl.arange(0, AT_HAND)
    return r, tl.load(used + r, mask=r < num_rows, other=0x7FFFFFFF)


@triton.jit(do_not_specialize=["n"])
def make_room(
    slots, places, holders, used, free, targets, now, n, num_rows, AT_HAND: tl.constexpr, OVERLAP: tl.constexpr
):
    """Grid [1]: the rows used longest ago, as many as are missing, and who gets them."""
    after_predecessor(OVERLAP)
    clock = tl.load(now)
    missing = 0
    for at in range(0, n, AT_HAND):
        i, slot, is_new = _claims(slots, places, at, n, AT_HAND)
        missing += tl.sum(is_new.to(tl.int32), axis=0)
        tl.store(targets + i, tl.full([AT_HAND], -1, tl.int64), mask=i < n)
    if missing == 0:
        return

    # The least time up to which enough rows were used last; of those used just then the first ones go.
    low, high, before = 0, clock, 0
    while low < high:
        middle = low + (high - low) // 2
        found = 0
        for at in range(0, num_rows, AT_HAND):
            r, when = _used(used, at, num_rows, AT_HAND)
            found += tl.sum((when <= middle).to(tl.int32), axis=0)
        if found >= missing:
            high = middle
        else:
            low, before = middle + 1, found

    taken, ties = 0, missing - before
    for at in range(0, num_rows, AT_HAND):
        r, when = _used(used, at, num_rows, AT_HAND)
        is_tie = when == low
        tie = tl.cumsum(is_tie.to(tl.int32), axis=0)
        goes = (when < low) | (is_tie & (tie <= ties))
        tl.store(free + taken + tl.cumsum(goes.to(tl.int32), axis=0) - 1, r, mask=goes)
        taken += tl.sum(goes.to(tl.int32), axis=0)
        ties -= tl.sum(is_tie.to(tl.int32), axis=0)
        holder = tl.load(holders + r, mask=goes, other=0)
        tl.store(places + holder, tl.full([AT_HAND], _ABSENT, tl.int32), mask=goes)
    tl.debug_barrier()

    first = 0
    for at in range(0, n, AT_HAND):
        i, slot, is_new = _claims(slots, places, at, n, AT_HAND)
        row = tl.load(free + first + tl.cumsum(is_new.to(tl.int32), axis=0) - 1, mask=is_new, other=0)
        first += tl.sum(is_new.to(tl.int32), axis=0)
        tl.debug_barrier()  # equal slots have been told apart before the claim is overwritten
        tl.store(places + slot, row, mask=is_new)
        tl.store(targets + i, row.to(tl.int64), mask=is_new)
        tl.store(holders + row, slot.to(tl.int32), mask=is_new)
        tl.store(used + row, tl.full([AT_HAND], 0, tl.int32) + clock, mask=is_new)


@triton.jit(do_not_specialize=["n"])
def read_rows(slots, places, rows, now, n, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr):
    """Grid [pieces of AT_ONCE slots]: where each slot's row is; then time passes."""
    after_predecessor(OVERLAP)
    if tl.program_id(0) == 0:
        tl.store(now, tl.load(now) + 1)
    i = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    row = tl.load(places + tl.load(slots + i, mask=i < n, other=0), mask=i < n, other=0)
    tl.store(rows + i, row.to(tl.int64), mask=i < n)


def claim_rows(slots: Tensor, places: Tensor, holders: Tensor, used: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.resident.claim_rows`; which of the rows used longest ago a slot gets may differ."""
    n, num_rows, device = slots.shape[0], holders.shape[0] - 1, slots.device
    rows, targets = torch.empty((2, n), dtype=torch.int64, device=device)
    if not n:
        return rows, targets
    free = torch.empty(min(n, num_rows), dtype=torch.int32, device=device)
    grid, options = (triton.cdiv(n, _FOUND_AT_ONCE),), overlap(device)
    find_rows[grid](slots, places, used, now, n, AT_ONCE=_FOUND_AT_ONCE, num_warps=4, **options)
    make_room[1,](
        slots, places, holders, used, free, targets, now, n, num_rows, AT_HAND=_AT_HAND, num_warps=16, **options
    )  # fmt: skip
    read_rows[grid](slots, places, rows, now, n, AT_ONCE=_FOUND_AT_ONCE, num_warps=4, **options)
    return rows, targets


@triton.jit
def _copy(
    rows, source, stride, head_stride, into, target, into_stride, into_head_stride, heads,
    HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One row, all heads."""
    head, d = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    mask = (head < heads) & (d < D)
    from_ = rows + source * stride + head.to(tl.int64) * head_stride + d
    to = into + target * into_stride + head.to(tl.int64) * into_head_stride + d
    tl.store(to, tl.load(from_, mask=mask), mask=mask)


@triton.jit
def copy_rows(
    keys, values, sources, targets, key_rows, value_rows,
    key_stride, key_head_stride, value_stride, value_head_stride,
    to_key_stride, to_key_head_stride, to_value_stride, to_value_head_stride, heads,
    HP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [n]: one row of keys and of values."""
    after_predecessor(OVERLAP)
    target = tl.load(targets + tl.program_id(0))
    if target < 0:
        return
    source = tl.load(sources + tl.program_id(0))
    _copy(keys, source, key_stride, key_head_stride, key_rows, target, to_key_stride, to_key_head_stride,
          heads, HP, DK, DKP)  # fmt: skip
    _copy(values, source, value_stride, value_head_stride, value_rows, target, to_value_stride, to_value_head_stride,
          heads, HP, DV, DVP)  # fmt: skip


def move_rows(
    keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor, key_rows: Tensor, value_rows: Tensor
) -> None:
    """See `ops.resident.move_rows`; what lies in host memory must be pinned, and vectors whole."""
    if not sources.shape[0]:
        return
    keys, values = (part if part.stride(2) == 1 else part.contiguous() for part in (keys, values))
    heads, strides = keys.shape[1], [at for part in (keys, values, key_rows, value_rows) for at in part.stride()[:2]]
    copy_rows[sources.shape[0],](
        keys, values, sources, targets, key_rows, value_rows, *strides, heads,
        HP=triton.next_power_of_2(heads), DK=keys.shape[2], DKP=triton.next_power_of_2(keys.shape[2]),
        DV=values.shape[2], DVP=triton.next_power_of_2(values.shape[2]), num_warps=4, **overlap(sources.device),
    )  # fmt: skip
