"""The Selection Cache on a GPU: each step finds out by itself whether the last selection serves again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import overlap
from tokenselect.ops.gpu.device_code import after_predecessor

_WARPS = 8


@triton.jit
def _sums(a, b, c, more_a, more_b, more_c):
    return a + more_a, b + more_b, c + more_c


@triton.jit
def decide(
    queries, last_queries, numbers, positions, firsts, slots, bounds,
    threshold, reach, recent, sinks, chosen, num_slots,
    SIZE: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, RECENT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [sequences]: compare queries, remember what will be new, and write the slots of the local window.

    The launch before this one wrote nothing of what is read but queries.
    """
    row, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    position, window, first = tl.load(positions + row), tl.load(numbers + row), tl.load(firsts + row)
    number = tl.arange(0, 8)
    own_numbers = numbers + row + number * batch
    before = tl.load(own_numbers, mask=number < 6, other=0)
    part, i = tl.arange(0, PARTS_PAD)[:, None], tl.arange(0, AT_ONCE)[None, :]
    inside = (part < PARTS) & (i < SIZE)
    place = (row * PARTS + part) * SIZE + i
    then = tl.load(last_queries + place, mask=inside, other=0.0)
    after_predecessor(OVERLAP)
    now = tl.load(queries + place, mask=inside, other=0.0).to(tl.float32)
    product, square, last_square = tl.reduce((now * then, now * now, then * then), 1, _sums)
    alike = product / tl.sqrt(tl.maximum(square * last_square, 1e-30)) >= threshold  # never where there is no number
    unlike = tl.sum(((tl.arange(0, PARTS_PAD) < PARTS) & (alike == 0)).to(tl.int32), axis=0)

    serves = ((unlike == 0) & (position - window < reach)).to(tl.int64)
    own_slots = slots + row * num_slots + sinks + chosen
    if serves == 0:
        window = position + 1 - recent
        n = tl.arange(0, RECENT)
        tl.store(own_slots + n, first + window + n, mask=n < recent)
        tl.store(last_queries + place, now, mask=inside)
    else:
        tl.store(own_slots + position - window, first + position)
    length = sinks + chosen + position + 1 - window
    bound = tl.where(number == 0, row, tl.where(number == 1, 1, tl.where(number == 2, row * num_slots, length)))
    tl.store(bounds + 4 * row + number, bound, mask=number < 4)
    # In this order: lookups, hits, tokens attended, tokens available.
    more = tl.where(number == 2, 1, tl.where(number == 3, serves, tl.where(number == 4, length, position + 1)))
    after = tl.where(number == 0, window, tl.where(number == 1, serves, before + more))
    tl.store(own_numbers, after, mask=number < 6)


def decide_reuse(
    queries: Tensor,
    last_queries: Tensor,
    numbers: Tensor,
    positions: Tensor,
    firsts: Tensor,
    slots: Tensor,
    bounds: Tensor,
    *,
    num_sinks: int,
    num_local: int,
    num_own: int,
    num_selected: int,
    parts: int,
    threshold: float,
) -> None:
    """Decide for each sequence whether its last selection serves its query again; else a new one must be made.

    Afterwards all is as `selection.select_tokens`, the definition, would leave it, but for the selected slots of a
    sequence that is not served. Positions follow each other, so of a window that serves again only the end is written.

    Args:
        queries: [B, Hq, D].
        last_queries: [B, Hq, D] float32, of the last selections; written to, as all that follows but `firsts`.
        numbers: [6, B] int64: where the window began at the last selection, whether it serves now, and sums of steps:
            lookups, hits, tokens attended, tokens available.
        positions: [B] int64, of the queries; only read.
        firsts: [B] int64, rows of the cache that hold the sequences' first tokens.
        slots: [B, n] int64, rows of the cache to attend: sinks, which are there already, selected tokens, local window.
        bounds: [4 * B] int64; of each sequence its query, 1, where its slots begin, how many are attended.
        num_sinks: first tokens, always attended.
        num_local: tokens before a query that are always attended; a window that reached twice as far serves no more.
        num_own: of the query itself: 1, or 0 where it is one of the local tokens.
        num_selected: tokens chosen.
        parts: that the heads of a query are compared in: KV heads, or 1.
        threshold: cosine of every part that is enough.
    """
    size = queries.shape[1] * queries.shape[2] // parts
    decide[queries.shape[0],](
        queries.contiguous(), last_queries, numbers, positions, firsts, slots, bounds,
        threshold, 2 * num_local, num_local + num_own, num_sinks, num_selected, slots.shape[1],
        SIZE=size, AT_ONCE=triton.next_power_of_2(size), PARTS=parts, PARTS_PAD=triton.next_power_of_2(parts),
        RECENT=triton.next_power_of_2(num_local + num_own), num_warps=_WARPS, **overlap(queries.device),
    )  # fmt: skip
