"""Kernels of the soft vote: one read of the keys, then sums of what it left.

`score_tiles` takes the logits of all heads against a tile of keys and leaves exponentials under the row's running
maximum; `reduce_rows` finds every row's maximum and sums; `sum_votes` adds the heads. A row is one query head of one
block under one view of the distances: row = (block * VIEWS + view) * num_q_heads + head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenselect.ops.gpu.device_code import first_slot, load_rotation, rotary_pairs, slots_of

# How a view rotates: all keys alike, each tile alike, or every key on its own.
ONCE = tl.constexpr(0)
BY_TILE = tl.constexpr(1)
BY_TOKEN = tl.constexpr(2)


@triton.jit
def _turned(
    q, partner, cos, sin, run, d, is_row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, SAME_RUN: tl.constexpr
):
    """Queries [ROWS, DP] rotated by the rows `run` of the tables."""
    if SAME_RUN:  # one block: its rows share the rotation
        run = tl.max(run, axis=0)
        angle, _, sign = rotary_pairs(d, HALF, INTERLEAVED)
        c = tl.load(cos + run * HALF + angle, mask=d < 2 * HALF, other=1.0)[None, :]
        s = tl.load(sin + run * HALF + angle, mask=d < 2 * HALF, other=0.0)[None, :] * sign[None, :]
    else:
        c, s = load_rotation(cos, sin, run, d, is_row, HALF, INTERLEAVED)
    return q * c + partner * s


@triton.jit
def _weigh(
    logits, offset, end, low, high, is_row, row, tile, most, total, chosen, weights, peaks, length, num_tiles
):
    """Store exponentials [ROWS, BLOCK_T] under the running maximum; returns it and the sums so far."""
    inside = offset[None, :] < end[:, None]
    logits = tl.where(inside, logits, float("-inf"))
    peak = tl.maximum(most, tl.max(logits, axis=1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    e = tl.exp(logits - safe[:, None])
    lift = tl.exp(most - safe)
    is_candidate = (offset[None, :] >= low[:, None]) & (offset[None, :] < high[:, None])
    total = total * lift + tl.sum(e, axis=1)
    chosen = chosen * lift + tl.sum(tl.where(is_candidate, e, 0.0), axis=1)
    place = row[:, None] * length + offset[None, :]
    tl.store(weights + place, e.to(weights.dtype.element_ty), mask=is_row[:, None] & is_candidate)
    tl.store(peaks + row * num_tiles + tile, safe, mask=is_row)
    return peak, total, chosen


@triton.jit
def score_tiles(
    queries, keys, key_scales, pages, padding, sequences, candidates, context,
    cos_0, sin_0, runs_0, cos_1, sin_1, runs_1,
    weights, peaks, stats,
    scale, num_blocks, num_tiles, tiles_each, page_size, run_size_0, run_size_1,
    key_stride, key_head_stride, scale_stride, scale_head_stride, page_stride,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, VIEWS: tl.constexpr, HOW_0: tl.constexpr, HOW_1: tl.constexpr,
    ONE_PAGE: tl.constexpr, HAS_SCALES: tl.constexpr, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid [groups of BLOCKS blocks that share sequence and start, num_kv_heads, shares of the tiles].

    Groups come first in the grid, so those that need the same keys run together and find them in the cache.
    """
    ROWS: tl.constexpr = BLOCKS * GROUP_PAD
    first = tl.program_id(0) * BLOCKS
    kv, share = tl.program_id(1), tl.program_id(2)
    num_kv = tl.num_programs(1)
    r = tl.arange(0, ROWS)
    block = tl.minimum(first + r // GROUP_PAD, num_blocks - 1)
    is_row = (r % GROUP_PAD < GROUP) & (first + r // GROUP_PAD < num_blocks)
    head = kv * GROUP + tl.minimum(r % GROUP_PAD, GROUP - 1)
    d = tl.arange(0, DP)

    sequence = tl.load(sequences + first)
    begin = tl.load(context + 2 * first)
    end = (tl.load(context + 2 * block + 1) - begin).to(tl.int32)
    low = (tl.load(candidates + 2 * block) - begin).to(tl.int32)
    high = (tl.load(candidates + 2 * block + 1) - begin).to(tl.int32)
    longest = tl.max(end, axis=0)
    first_tile = share * tiles_each
    last_tile = tl.minimum(first_tile + tiles_each, tl.cdiv(longest, BLOCK_T))
    if first_tile >= last_tile:
        return

    _, partner, sign = rotary_pairs(d, HALF, INTERLEAVED)
    own = queries + ((block * num_kv * GROUP + head) * D)[:, None]
    q = tl.load(own + d[None, :], mask=(d < D)[None, :], other=0.0) * scale
    p = tl.load(own + partner[None, :], mask=(d < 2 * HALF)[None, :], other=0.0) * scale

    begin_0 = tl.load(runs_0 + block)
    count_0 = tl.load(runs_0 + block + 1) - begin_0
    begin_1 = tl.load(runs_1 + block)
    count_1 = tl.load(runs_1 + block + 1) - begin_1
    dtype = tl.float16 if HAS_SCALES else keys.dtype.element_ty
    turned_0 = q.to(dtype)
    if HOW_0 == ONCE:
        turned_0 = _turned(q, p, cos_0, sin_0, begin_0, d, is_row, HALF, INTERLEAVED, BLOCKS == 1).to(dtype)

    most_0 = tl.full([ROWS], float("-inf"), tl.float32)
    total_0 = tl.zeros([ROWS], tl.float32)
    chosen_0 = tl.zeros([ROWS], tl.float32)
    most_1, total_1, chosen_1 = most_0, total_0, chosen_0
    row = (block * VIEWS * num_kv * GROUP + head).to(tl.int64)
    row_1 = row + num_kv * GROUP
    length = num_tiles * BLOCK_T
    page_row = pages + sequence * page_stride
    start = first_slot(page_row, page_size, tl.load(padding + sequence), begin, ONE_PAGE)
    head_keys = keys + kv.to(tl.int64) * key_head_stride

    for tile in range(first_tile, last_tile):
        offset = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = offset < longest
        slot = slots_of(offset, page_row, page_size, start, is_token, ONE_PAGE)
        token_keys = head_keys + slot * key_stride
        is_key = is_token[:, None] & (d < D)[None, :]
        k = tl.load(token_keys[:, None] + d[None, :], mask=is_key, other=0.0)
        unit = tl.full([BLOCK_T], 1.0, tl.float32)
        if HAS_SCALES:
            own_scales = key_scales + slot * scale_stride + kv.to(tl.int64) * scale_head_stride
            unit = tl.load(own_scales, mask=is_token, other=0.0)
            k = k.to(tl.float16)

        if HOW_0 == BY_TILE:
            run = begin_0 + tl.minimum(tile * BLOCK_T // run_size_0, count_0 - 1)
            turned_0 = _turned(q, p, cos_0, sin_0, run, d, is_row, HALF, INTERLEAVED, BLOCKS == 1).to(dtype)
        k_0 = k
        if HOW_0 == BY_TOKEN:
            k_0 = _turned_back(
                k, token_keys, cos_0, sin_0, begin_0, count_0, offset, run_size_0, d, is_token, HALF, INTERLEAVED
            )
        logits = tl.dot(turned_0, tl.trans(k_0), input_precision=PRECISION) * unit[None, :]
        most_0, total_0, chosen_0 = _weigh(
            logits, offset, end, low, high, is_row, row, tile, most_0, total_0, chosen_0,
            weights, peaks, length, num_tiles,
        )  # fmt: skip

        if VIEWS == 2:
            turned_1 = turned_0
            k_1 = k
            if HOW_1 == BY_TILE:
                run = begin_1 + tl.minimum(tile * BLOCK_T // run_size_1, count_1 - 1)
                turned_1 = _turned(q, p, cos_1, sin_1, run, d, is_row, HALF, INTERLEAVED, BLOCKS == 1).to(dtype)
            elif HOW_1 == ONCE:
                turned_1 = _turned(q, p, cos_1, sin_1, begin_1, d, is_row, HALF, INTERLEAVED, BLOCKS == 1).to(dtype)
            else:
                turned_1 = q.to(dtype)
                k_1 = _turned_back(
                    k, token_keys, cos_1, sin_1, begin_1, count_1, offset, run_size_1, d, is_token, HALF, INTERLEAVED
                )
            logits = tl.dot(turned_1, tl.trans(k_1), input_precision=PRECISION) * unit[None, :]
            most_1, total_1, chosen_1 = _weigh(
                logits, offset, end, low, high, is_row, row_1, tile, most_1, total_1, chosen_1,
                weights, peaks, length, num_tiles,
            )  # fmt: skip

    _store_stats(stats, row, share, most_0, total_0, chosen_0, is_row)
    if VIEWS == 2:
        _store_stats(stats, row_1, share, most_1, total_1, chosen_1, is_row)


@triton.jit
def _turned_back(
    k, rows, cos, sin, begin, count, offset, run_size, d, is_token, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Keys [BLOCK_T, DP] rotated the other way: <R q, k> = <q, R' k>. Of one block; for runs that cut a tile."""
    run = tl.max(begin, axis=0) + tl.minimum(offset // run_size, tl.max(count, axis=0) - 1)
    _, partner, _ = rotary_pairs(d, HALF, INTERLEAVED)
    turns = is_token[:, None] & (d < 2 * HALF)[None, :]
    y = tl.load(rows[:, None] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    c, s = load_rotation(cos, sin, run, d, is_token, HALF, INTERLEAVED)
    return (k.to(tl.float32) * c - y * s).to(k.dtype)


@triton.jit
def _store_stats(stats, row, share, most, total, chosen, is_row):
    place = stats + (row * tl.num_programs(2) + share) * 3
    tl.store(place, most, mask=is_row)
    tl.store(place + 1, total, mask=is_row)
    tl.store(place + 2, chosen, mask=is_row)


@triton.jit
def reduce_rows(
    stats, totals, context, num_shares, share_size, ROWS_EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid [rows]: maximum and sums of a row over the shares that its block's context reaches into."""
    row = tl.program_id(0).to(tl.int64)
    block = row // ROWS_EACH
    length = (tl.load(context + 2 * block + 1) - tl.load(context + 2 * block)).to(tl.int32)
    shares = tl.cdiv(length, share_size)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    chosen = tl.zeros([BLOCK], tl.float32)
    for start in range(0, shares, BLOCK):
        share = start + tl.arange(0, BLOCK)
        place = stats + (row * num_shares + share) * 3
        m = tl.load(place, mask=share < shares, other=float("-inf"))
        peak = tl.maximum(most, m)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        old, new = tl.exp(most - safe), tl.exp(m - safe)
        total = total * old + tl.load(place + 1, mask=share < shares, other=0.0) * new
        chosen = chosen * old + tl.load(place + 2, mask=share < shares, other=0.0) * new
        most = peak
    peak = tl.max(most, axis=0)
    lift = tl.exp(most - tl.where(peak == float("-inf"), 0.0, peak))
    tl.store(totals + row * 3, peak)
    tl.store(totals + row * 3 + 1, tl.sum(total * lift, axis=0))
    tl.store(totals + row * 3 + 2, tl.sum(chosen * lift, axis=0))


@triton.jit
def _view_total(totals, row, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr):
    """Sum of a view's votes over its candidates, never 0."""
    h = tl.arange(0, HEADS_PAD)
    place = totals + (row + h) * 3
    total = tl.load(place + 1, mask=h < HEADS, other=1.0)
    chosen = tl.load(place + 2, mask=h < HEADS, other=0.0)
    return tl.maximum(tl.sum(chosen / total, axis=0), 1.1754944e-38)


@triton.jit
def sum_votes(
    weights, peaks, totals, candidates, context, start_loc, votes, num_tiles,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, VIEWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, pieces of BLOCK tokens]: add the normalised weights of all heads and views."""
    block = tl.program_id(0)
    begin = tl.load(context + 2 * block)
    low, high = tl.load(candidates + 2 * block) - begin, tl.load(candidates + 2 * block + 1) - begin
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= high:
        return
    is_candidate = (offset >= low) & (offset < high)
    first = block.to(tl.int64) * VIEWS * HEADS
    sum_0 = _view_total(totals, first, HEADS, HEADS_PAD)
    sum_1 = sum_0
    if VIEWS == 2:
        sum_1 = _view_total(totals, first + HEADS, HEADS, HEADS_PAD)
    length = num_tiles * BLOCK_T
    out = tl.zeros([BLOCK], tl.float32)
    for at in range(0, VIEWS * HEADS, ROWS):
        r = at + tl.arange(0, ROWS)
        is_row = r < VIEWS * HEADS
        row = first + r
        most = tl.load(totals + row * 3, mask=is_row, other=0.0)
        total = tl.load(totals + row * 3 + 1, mask=is_row, other=1.0)
        unit = 1.0 / (total * tl.where(r < HEADS, sum_0, sum_1))
        mask = is_row[:, None] & is_candidate[None, :]
        peak = tl.load(peaks + row[:, None] * num_tiles + (offset // BLOCK_T)[None, :], mask=mask, other=0.0)
        e = tl.load(weights + row[:, None] * length + offset[None, :], mask=mask, other=0.0).to(tl.float32)
        out += tl.sum(e * (tl.exp(peak - most[:, None]) * unit[:, None]), axis=0)
    tl.store(votes + tl.load(start_loc + block) + offset - low, out, mask=is_candidate)
