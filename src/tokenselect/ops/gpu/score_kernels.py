"""Kernels of the soft vote: one read of the keys, then sums of what it left.

`score_tiles` takes the logits of all heads against a tile of keys and leaves powers of 2 under the tile's own maximum;
`reduce_rows` finds every row's maximum and sums; `sum_votes` adds the heads. A row is one query head of one block under
one view of the distances. What belongs to the rows of a group of blocks and a KV head lies together: powers
[.., tiles * BLOCK_T, ROWS], maxima [.., tiles, ROWS], maximum and sums of a program's share [.., shares, ROWS, 3].
Logits are in units of log2(e). A block whose last selection serves again, `served`, is left as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenselect.ops.gpu.device_code import (
    after_predecessor,
    first_slot,
    is_served,
    load_rotation,
    rotary_pairs,
    slots_of,
)

# How a view rotates: all keys alike, each tile alike, or every key on its own.
ONCE = tl.constexpr(0)
BY_TILE = tl.constexpr(1)
BY_TOKEN = tl.constexpr(2)
PIECE = tl.constexpr(16)  # tokens with a maximum of their own: those of a warp
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rotation(cos, sin, run, d, is_row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ALIKE: tl.constexpr):
    """Cosines and signed sines of the rows `run` of the tables, for every row or one for all of them."""
    if ALIKE:  # one block: its rows share the rotation
        angle, _, sign = rotary_pairs(d, HALF, INTERLEAVED)
        at = tl.max(run, axis=0) * HALF + angle
        c = tl.load(cos + at, mask=d < 2 * HALF, other=1.0)[None, :]
        s = (tl.load(sin + at, mask=d < 2 * HALF, other=0.0) * sign)[None, :]
    else:
        c, s = load_rotation(cos, sin, run, d, is_row, HALF, INTERLEAVED)
    return c, s


@triton.jit
def _rows(
    first, kv, num_blocks, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """Of each row: its view, its block, its query head, and whether it is one."""
    r = tl.arange(0, ROWS)
    own_block = first + r // GROUP_PAD % BLOCKS
    head = kv * GROUP + tl.minimum(r % GROUP_PAD, GROUP - 1)
    is_row = (r % GROUP_PAD < GROUP) & (own_block < num_blocks)
    return r // (BLOCKS * GROUP_PAD), tl.minimum(own_block, num_blocks - 1), head, is_row


@triton.jit
def _queries(
    queries, block, head, num_heads, factor, d, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Queries [ROWS, DP] and, for each dimension, that which it turns with."""
    _, partner, _ = rotary_pairs(d, HALF, INTERLEAVED)
    own = queries + ((block * num_heads + head) * D)[:, None]
    q = tl.load(own + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
    p = tl.load(own + partner[None, :], mask=(d < 2 * HALF)[None, :], other=0.0).to(tl.float32)
    return q * factor, p * factor


@triton.jit
def _integer_products(k, turned, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):
    """Of integer keys and queries of 14 bits, both parts of which are rows of one product."""
    upper = tl.minimum(tl.maximum(tl.floor(turned * 0.0078125 + 0.5), -127.0), 127.0)
    lower = tl.floor(turned - upper * 128.0 + 0.5)
    if ROWS == 8:  # two products of the least size
        upper_product = tl.dot(k, tl.trans(upper.to(tl.int8)), out_dtype=tl.int32)
        return upper_product * 128 + tl.dot(k, tl.trans(lower.to(tl.int8)), out_dtype=tl.int32)
    parts = tl.permute(tl.join(upper.to(tl.int8), lower.to(tl.int8)), [2, 0, 1])
    products = tl.dot(k, tl.trans(tl.reshape(parts, [2 * ROWS, DP])), out_dtype=tl.int32)
    upper_product, lower_product = tl.split(tl.permute(tl.reshape(products, [BLOCK_T, 2, ROWS]), [0, 2, 1]))
    return upper_product * 128 + lower_product


@triton.jit
def score_tiles(
    queries, keys, key_scales, key_center, pages, padding, sequences, candidates, context, served,
    cos_0, sin_0, runs_0, cos_1, sin_1, runs_1, alike,
    weights, peaks, stats,
    scale, num_blocks, num_tiles, tiles_each, page_size, run_size,
    key_stride, key_head_stride, scale_stride, scale_head_stride, page_stride,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, VIEWS: tl.constexpr, HOW: tl.constexpr,
    ONE_PAGE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_CENTER: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_CONTEXT: tl.constexpr, PRECISION: tl.constexpr, SETTLED: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [groups of BLOCKS blocks that share sequence and start, num_kv_heads, shares of the tiles].

    Groups come first in the grid, so those that need the same keys run together and find them in the cache. The rows
    of a product are (view, block, head of the group). With two views the first rotates all keys alike, and HOW is how
    the second does; with one it is how that one does, which then comes as the second. SETTLED: the launch before this
    one wrote nothing of what is read but keys, and nobody is served.
    """
    if not SETTLED:
        after_predecessor(OVERLAP)
        if is_served(served, tl.program_id(0) * BLOCKS):
            return
    ROWS: tl.constexpr = VIEWS * BLOCKS * GROUP_PAD
    first = tl.program_id(0) * BLOCKS
    kv, share = tl.program_id(1), tl.program_id(2)
    num_kv = tl.num_programs(1)
    r = tl.arange(0, ROWS)
    view, block, head, is_row = _rows(first, kv, num_blocks, GROUP, GROUP_PAD, BLOCKS, ROWS)
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
        if SETTLED:
            after_predecessor(OVERLAP)
        return

    q, p = _queries(queries, block, head, num_kv * GROUP, scale * LOG2E, d, D, HALF, INTERLEAVED)
    run_begin = tl.load(runs_1 + block)
    last_run = tl.load(runs_1 + block + 1) - run_begin - 1
    # Integer keys meet integer queries, of 14 bits in two parts; turned keys are no integers any more.
    AS_INTEGERS: tl.constexpr = HAS_SCALES and HOW != BY_TOKEN
    dtype = tl.float16 if HAS_SCALES else keys.dtype.element_ty
    unit = tl.full([ROWS], 1.0, tl.float32)
    if AS_INTEGERS:
        unit = tl.maximum(tl.sqrt(tl.max(q * q + p * p, axis=1)), 1e-20) / (127 * 128)
        q, p = q / unit[:, None], p / unit[:, None]
    turned = q
    if HOW != BY_TOKEN:  # as all keys, or those of the first tiles
        c, s = load_rotation(cos_1, sin_1, run_begin, d, is_row, HALF, INTERLEAVED)
        turned = q * c + p * s
    is_second = (view == 1)[:, None]
    turned_0 = turned
    if VIEWS == 2:
        c, s = load_rotation(cos_0, sin_0, tl.load(runs_0 + block), d, is_row, HALF, INTERLEAVED)
        turned_0 = q * c + p * s
        turned = tl.where(is_second, turned, turned_0)

    center_row = key_center + (sequence * num_kv + kv) * D
    shift = unit
    if HAS_CENTER:
        center = tl.load(center_row + d, mask=d < D, other=0.0)
        shift = tl.sum(turned * center[None, :], axis=1) * unit
    own_place = (tl.program_id(0) * num_kv + kv).to(tl.int64)
    own_weights = weights + own_place * num_tiles * BLOCK_T * ROWS + r[None, :]
    own_peaks = peaks + own_place * num_tiles * (BLOCK_T // PIECE) * ROWS + r[None, :]
    page_row = pages + sequence * page_stride
    start = first_slot(page_row, page_size, tl.load(padding + sequence), begin, ONE_PAGE)
    head_keys = keys + kv.to(tl.int64) * key_head_stride
    head_scales = key_scales + kv.to(tl.int64) * scale_head_stride
    n = tl.arange(0, BLOCK_T)
    PIECES: tl.constexpr = BLOCK_T // PIECE
    most = tl.full([PIECES, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PIECES, PIECE, ROWS], tl.float32)  # summed over the tokens at the end
    chosen = tl.zeros([PIECES, PIECE, ROWS], tl.float32)

    # First the tiles that rotate alike, then those that each rotate on their own.
    alike_end = first_tile
    if HOW == BY_TILE and alike is not None:
        same_runs = tl.min(tl.load(alike + block), axis=0).to(tl.int32)
        alike_end = tl.minimum(tl.maximum(same_runs * run_size // BLOCK_T, first_tile), last_tile)
    if SETTLED:
        after_predecessor(OVERLAP)
    for PART in tl.static_range(0 if HOW == BY_TILE else 1, 2):
        part_begin, part_end = (first_tile, alike_end) if PART == 0 else (alike_end, last_tile)
        for tile in tl.range(part_begin, part_end, num_stages=STAGES):  # so that scales are asked for ahead, too
            offset = tile * BLOCK_T + n
            is_token = offset < longest
            is_key = is_token[:, None] & (d < D)[None, :] if D < DP else is_token[:, None]
            slot = slots_of(offset, page_row, page_size, start, is_token, ONE_PAGE)
            if ONE_PAGE:
                base = start + tile * BLOCK_T
                own_keys = head_keys + base * key_stride + n[:, None] * key_stride + d[None, :]
            else:
                own_keys = (head_keys + slot * key_stride)[:, None] + d[None, :]
            k = tl.load(own_keys, mask=is_key, other=0.0, eviction_policy="evict_first")
            if HAS_SCALES:
                factors = tl.load(head_scales + slot * scale_stride, mask=is_token, other=0.0)
            own_turned, own_shift = turned, shift
            if HOW == BY_TILE and PART == 1:
                run = run_begin + tl.minimum(tile * BLOCK_T // run_size, last_run)
                run_c, run_s = _rotation(cos_1, sin_1, run, d, is_row, HALF, INTERLEAVED, BLOCKS == 1)
                own_turned = q * run_c + p * run_s
                if VIEWS == 2:
                    own_turned = tl.where(is_second, own_turned, turned_0)
                if HAS_CENTER:
                    own_shift = tl.sum(own_turned * center[None, :], axis=1) * unit
            if HOW == BY_TOKEN:
                run = run_begin[:, None] + tl.minimum((offset // run_size)[None, :], last_run[:, None])
                k = _turned_back(
                    k, head_keys + slot * key_stride, cos_1, sin_1, tl.max(run, axis=0), d, is_token, HALF, INTERLEAVED
                )
            if AS_INTEGERS:
                logits = _integer_products(k, own_turned, BLOCK_T, ROWS, DP).to(tl.float32) * unit[None, :]
            else:
                logits = tl.dot(k.to(dtype), tl.trans(own_turned.to(dtype)), input_precision=PRECISION)
            if HAS_SCALES:
                logits *= factors[:, None]
            if HAS_CENTER and HOW == BY_TOKEN:
                same_rows = center_row + tl.zeros([BLOCK_T], tl.int32)
                wide = center[None, :] + tl.zeros([BLOCK_T, DP], tl.float32)
                back = _turned_back(wide, same_rows, cos_1, sin_1, tl.max(run, axis=0), d, is_token, HALF, INTERLEAVED)
                logits += tl.dot(back.to(dtype), tl.trans(own_turned.to(dtype)), input_precision=PRECISION)
            elif HAS_CENTER:
                logits += own_shift[None, :]

            # Powers under the piece's maximum: no warp waits for another.
            logits = tl.where(offset[:, None] < end[None, :], logits, float("-inf"))
            logits = tl.reshape(logits, [PIECES, PIECE, ROWS])
            peak = tl.max(logits, axis=1)
            if peaks.dtype.element_ty == tl.int16:  # the whole number next to it, which the bits of the sum end with
                peak = tl.minimum(tl.maximum(peak, -32768.0), 32767.0) + 12582912.0
                kept_peak = peak.to(tl.int32, bitcast=True).to(tl.int16)
                peak -= 12582912.0
            else:
                peak = tl.maximum(peak, -1e30)
                kept_peak = peak
            e = tl.exp2(tl.minimum(logits - peak[:, None, :], 1.0))
            kept = tl.reshape(e, [BLOCK_T, ROWS]).to(weights.dtype.element_ty)
            # The L2 cache is to keep them for `sum_votes`, and not the keys.
            tl.store(own_weights + offset[:, None] * ROWS, kept, eviction_policy="evict_last")
            tl.store(own_peaks + tile * PIECES * ROWS + tl.arange(0, PIECES)[:, None] * ROWS, kept_peak)
            highest = tl.maximum(most, peak)
            old, new = tl.exp2(most - highest), tl.exp2(peak - highest)
            total = total * old[:, None, :] + e * new[:, None, :]
            if HAS_CONTEXT:
                is_candidate = (offset[:, None] >= low[None, :]) & (offset[:, None] < high[None, :])
                is_candidate = tl.reshape(is_candidate, [PIECES, PIECE, ROWS])
                chosen = chosen * old[:, None, :] + tl.where(is_candidate, e, 0.0) * new[:, None, :]
            most = highest

    place = stats + ((own_place * tl.num_programs(2) + share) * ROWS + r) * 3
    highest = tl.max(most, axis=0)
    lift = tl.exp2(most - highest[None, :])
    all_of_it = tl.sum(tl.sum(total, axis=1) * lift, axis=0)
    tl.store(place, highest)
    tl.store(place + 1, all_of_it)
    tl.store(place + 2, tl.sum(tl.sum(chosen, axis=1) * lift, axis=0) if HAS_CONTEXT else all_of_it)


@triton.jit
def _turned_back(k, rows, cos, sin, run, d, is_token, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Keys [BLOCK_T, DP] rotated the other way: <R q, k> = <q, R' k>. Of one block; for runs that cut a tile."""
    _, partner, _ = rotary_pairs(d, HALF, INTERLEAVED)
    turns = is_token[:, None] & (d < 2 * HALF)[None, :]
    y = tl.load(rows[:, None] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    c, s = load_rotation(cos, sin, run, d, is_token, HALF, INTERLEAVED)
    out = k.to(tl.float32) * c - y * s
    return out if k.dtype == tl.int8 else out.to(k.dtype)


@triton.jit
def reduce_rows(
    stats, totals, context, served, maxima, num_listed, num_chunks, num_blocks, num_shares, share_size,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [groups, num_kv_heads, ROWS]: maximum and sums of a row over the shares that its context reaches into.

    Where `maxima` are wanted, they are made ready for `sum_votes`.
    """
    r = tl.program_id(2)
    block = tl.minimum(tl.program_id(0) * BLOCKS + r // GROUP_PAD % BLOCKS, num_blocks - 1)
    length = (tl.load(context + 2 * block + 1) - tl.load(context + 2 * block)).to(tl.int32)
    if is_served(served, tl.program_id(0) * BLOCKS):
        return
    if maxima is not None:
        first, last = tl.program_id(0) * BLOCKS, tl.minimum((tl.program_id(0) + 1) * BLOCKS, num_blocks)
        lane, own = tl.arange(0, BLOCK), tl.program_id(1) * ROWS + r
        for at in range(first * num_chunks + own * BLOCK, last * num_chunks, tl.num_programs(1) * ROWS * BLOCK):
            tl.store(maxima + at + lane, -1, mask=at + lane < last * num_chunks)
        if own == 0:
            tl.store(num_listed + first + lane, 0, mask=first + lane < last)
    after_predecessor(OVERLAP)  # which read that too
    shares = tl.cdiv(length, share_size)
    own_place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    chosen = tl.zeros([BLOCK], tl.float32)
    for start in range(0, shares, BLOCK):
        share = start + tl.arange(0, BLOCK)
        place = stats + ((own_place * num_shares + share) * ROWS + r) * 3
        m = tl.load(place, mask=share < shares, other=-1e30)
        peak = tl.maximum(most, m)
        old, new = tl.exp2(most - peak), tl.exp2(m - peak)
        total = total * old + tl.load(place + 1, mask=share < shares, other=0.0) * new
        chosen = chosen * old + tl.load(place + 2, mask=share < shares, other=0.0) * new
        most = peak
    peak = tl.max(most, axis=0)
    lift = tl.exp2(most - peak)
    place = totals + (own_place * ROWS + r) * 3
    tl.store(place, peak)
    tl.store(place + 1, tl.sum(total * lift, axis=0))
    tl.store(place + 2, tl.sum(chosen * lift, axis=0))


@triton.jit
def _view_sums(totals, KV: tl.constexpr, KV_PAD: tl.constexpr, ROWS: tl.constexpr, GROUP, GROUP_PAD: tl.constexpr):
    """For each row the sum of all votes of its block under its view, never 0."""
    r = tl.arange(0, ROWS)
    kv = tl.arange(0, KV_PAD)
    place = totals + (kv[:, None] * ROWS + r[None, :]) * 3
    is_head = (kv < KV)[:, None] & (r % GROUP_PAD < GROUP)[None, :]
    total = tl.load(place + 1, mask=is_head, other=1.0)
    chosen = tl.load(place + 2, mask=is_head, other=0.0)
    by_row = tl.sum(chosen / total, axis=0)
    alike = (r // GROUP_PAD)[:, None] == (r // GROUP_PAD)[None, :]
    return tl.maximum(tl.sum(tl.where(alike, by_row[None, :], 0.0), axis=1), 1.1754944e-38)


@triton.jit
def _powers(
    weights, peaks, place, first, first_piece, num_pieces, KV: tl.constexpr, KV_AT_ONCE: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What `score_tiles` left of some KV heads [KV_AT_ONCE, PIECES, PIECE, ROWS], and the pieces' maxima."""
    r = tl.arange(0, ROWS)
    kv = first + tl.arange(0, KV_AT_ONCE)
    piece = first_piece + tl.arange(0, PIECES)
    inside = (kv < KV)[:, None] & (piece < num_pieces)[None, :]
    own = (place + kv)[:, None] * num_pieces + piece[None, :]
    peak = tl.load(peaks + own[:, :, None] * ROWS + r, mask=inside[:, :, None], other=-32768).to(tl.float32)
    token = own[:, :, None] * PIECE + tl.arange(0, PIECE)
    kept = tl.load(weights + token[:, :, :, None] * ROWS + r, mask=inside[:, :, None, None], other=0.0)
    return kept, peak


@triton.jit
def sum_votes(
    weights, peaks, totals, candidates, context, served, start_loc, votes, maxima, horizon, prior,
    num_blocks, num_pieces, num_groups, num_chunks,
    KV: tl.constexpr, KV_PAD: tl.constexpr, KV_AT_ONCE: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, BLOCKS: tl.constexpr, LAUNCHES: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [groups, shares of PIECES pieces]: add the normalised weights of all heads and views, some KV heads at once.

    Where `maxima` are wanted (see `topk.Maxima`), a context has candidates only. Only totals are new: what
    `score_tiles` left was complete before the kernel in between began, so it is asked for at once.
    """
    group, first_piece = tl.program_id(0), (tl.num_programs(1) - 1 - tl.program_id(1)) * PIECES
    if is_served(served, group * BLOCKS):
        return
    first_place = (group * KV).to(tl.int64)
    kept, peak = _powers(weights, peaks, first_place, 0, first_piece, num_pieces, KV, KV_AT_ONCE, PIECES, ROWS)
    after_predecessor(OVERLAP)
    r = tl.arange(0, ROWS)
    kv = tl.arange(0, KV_AT_ONCE)
    out = tl.zeros([KV_AT_ONCE, PIECES, PIECE, ROWS], tl.float32)  # summed over heads at the end
    for launch in tl.static_range(LAUNCHES):
        own_place = ((launch * num_groups + group) * KV).to(tl.int64)
        sums = _view_sums(totals + own_place * ROWS * 3, KV, KV_PAD, ROWS, GROUP, GROUP_PAD)
        for first in tl.static_range(0, KV, KV_AT_ONCE):
            if launch + first > 0:
                kept, peak = _powers(
                    weights, peaks, own_place, first, first_piece, num_pieces, KV, KV_AT_ONCE, PIECES, ROWS
                )
            is_head = (first + kv < KV)[:, None]
            own_totals = totals + ((own_place + first + kv)[:, None] * ROWS + r[None, :]) * 3
            unit = 1.0 / (tl.load(own_totals + 1, mask=is_head, other=1.0) * sums[None, :])
            highest = tl.load(own_totals, mask=is_head, other=0.0)
            factor = tl.exp2(peak - highest[:, None, :]) * unit[:, None, :]
            out += kept.to(tl.float32) * factor[:, :, None, :]
    piece = first_piece + tl.arange(0, PIECES)
    offset = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    for n in tl.static_range(BLOCKS):
        block = group * BLOCKS + n
        if block < num_blocks:
            begin = tl.load(context + 2 * block)
            low = (tl.load(candidates + 2 * block) - begin).to(tl.int32)
            high = (tl.load(candidates + 2 * block + 1) - begin).to(tl.int32)
            mine = (r // GROUP_PAD % BLOCKS == n) & (r % GROUP_PAD < GROUP)
            own_votes = tl.sum(tl.sum(tl.where(mine[None, None, None, :], out, 0.0), axis=3), axis=0)
            if horizon is not None:
                own_votes = (own_votes + prior) * (horizon / (horizon + (high - offset).to(tl.float32)))
            place = votes + tl.load(start_loc + block) + offset - low
            is_vote = (offset >= low) & (offset < high)
            tl.store(place, own_votes, mask=is_vote)
            if maxima is not None:
                bits = own_votes.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                own = maxima + block * num_chunks + (offset & num_chunks - 1)
                tl.atomic_max(own, bits, mask=is_vote, sem="relaxed")
