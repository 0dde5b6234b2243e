"""Kernels of sparse attention: few queries gather as they go, many queries gather and rotate once.

Logits are kept in units of log2(e), so that weights are powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenselect.ops.gpu.device_code import after_predecessor, is_served, load_halves, load_rotated

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(products, scale, softcap, HAS_CAP: tl.constexpr):
    """Products of queries and keys as logits, in units of log2(e)."""
    if HAS_CAP:
        logits = products * (scale / softcap)
        turns = tl.exp(-2.0 * tl.abs(logits))  # tanh without overflow
        return tl.where(logits < 0, -softcap, softcap) * ((1.0 - turns) / (1.0 + turns)) * LOG2E
    return products * (scale * LOG2E)


@triton.jit
def _absorb(logits, v, most, total, out, PRECISION: tl.constexpr):
    """One step of the running softmax; a row may see no key yet."""
    peak = tl.maximum(most, tl.max(logits, axis=1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(logits - safe[:, None])
    lift = tl.exp2(most - safe)
    total = total * lift + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * lift[:, None], input_precision=PRECISION)
    return peak, total, out


@triton.jit
def _with_sink(most, total, head, sink_logits, HAS_SINKS: tl.constexpr):
    """What to multiply a row's sums with; a learned sink logit takes part in the softmax."""
    if HAS_SINKS:
        sink = tl.load(sink_logits + head) * LOG2E
        peak = tl.maximum(most, sink)
        lift = tl.exp2(most - peak)
        return lift / (total * lift + tl.exp2(sink - peak))
    return 1.0 / total


@triton.jit
def _bounds(blocks, b):
    """Of a block: its first query, how many it has, its first slot, how many it attends."""
    own = blocks + 4 * b
    return tl.load(own), tl.load(own + 1).to(tl.int32), tl.load(own + 2), tl.load(own + 3).to(tl.int32)


@triton.jit
def _last_selection(numbers, positions, firsts, num_fixed, num_slots, b):
    """Bounds of sequence `b` as `_bounds` and the row of its own token, which its slots may lack, if it is served."""
    position = tl.load(positions + b)
    length = tl.minimum(num_fixed + position + 1 - tl.load(numbers + b), num_slots).to(tl.int32)
    return b, 1, b.to(tl.int64) * num_slots, length, tl.load(firsts + b) + position


@triton.jit
def _share(split, splits, length, BLOCK_N: tl.constexpr):
    """Where a program's share of `length` slots begins: whole steps of BLOCK_N."""
    return split * (tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N)


@triton.jit
def attend_few(
    queries, keys, values, slots, cos, sin, blocks, served, numbers, positions, firsts, num_fixed, num_slots,
    parts, sums, scale, softcap, key_stride, key_head_stride, value_stride, value_head_stride, splits,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr, HALVES: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, IF_SERVED: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [blocks, num_kv_heads, splits]: all queries of a KV head over a share of the slots, gathered in place.

    Row r is query r // GROUP of the block, query head r % GROUP of the KV head. HALVES: a vector is two halves that
    turn together, so that no element is loaded twice. Blocks that are `served` attend IF_SERVED, the others otherwise.
    SETTLED: the launch before this one wrote nothing of what is read but keys, values and slots. IF_SERVED: it found
    out who is served. A block that was served in its last step is likely to be so again and attends meanwhile, what it
    attends follows from `numbers`, which do not change where that is so; else nothing comes of it.
    """
    kv, split = tl.program_id(1), tl.program_id(2)
    num_kv = tl.num_programs(1)
    if IF_SERVED:
        is_likely = is_served(served, tl.program_id(0))
        first, own, begin, length, own_slot = _last_selection(
            numbers, positions, firsts, num_fixed, num_slots, tl.program_id(0)
        )
        n = _share(split, splits, length, BLOCK_N) + tl.arange(0, BLOCK_N)
        slot = tl.load(slots + begin + n, mask=n < length, other=0)
        if not is_likely:
            after_predecessor(OVERLAP)
        if not (is_likely | is_served(served, tl.program_id(0))):
            return
    else:
        if not SETTLED:
            after_predecessor(OVERLAP)
        if is_served(served, tl.program_id(0)):
            return
        first, own, begin, length = _bounds(blocks, tl.program_id(0))
    d = tl.arange(0, DP)
    r = tl.arange(0, ROWS)
    at = length - own + r // GROUP
    is_row = r // GROUP < own
    rows = queries + ((first + r // GROUP) * num_kv * GROUP + kv * GROUP + r % GROUP) * D
    dtype = queries.dtype.element_ty
    if HALVES:
        h = tl.arange(0, HALF)
        q, q_2 = load_halves(rows, cos, sin, at, h, is_row, HALF)
        q, q_2 = q.to(dtype), q_2.to(dtype)
    else:
        q = load_rotated(rows, cos, sin, at, d, is_row, D, HALF, INTERLEAVED).to(dtype)
    begins = _share(split, splits, length, BLOCK_N)
    if not IF_SERVED:
        if SETTLED:
            after_predecessor(OVERLAP)
        n = begins + tl.arange(0, BLOCK_N)
        slot = tl.load(slots + begin + n, mask=n < length, other=0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DP], tl.float32)
    head_keys = keys + kv.to(tl.int64) * key_head_stride
    head_values = values + kv.to(tl.int64) * value_head_stride
    for start in range(begins, tl.minimum(_share(split + 1, splits, length, BLOCK_N), length), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_key = n < length
        if IF_SERVED:
            slot = tl.where(n == length - 1, own_slot, slot)
        is_value = is_key[:, None] & (d < D)[None, :]
        v = tl.load((head_values + slot * value_stride)[:, None] + d[None, :], mask=is_value, other=0.0)
        token_keys = head_keys + slot * key_stride
        if HALVES:
            k, k_2 = load_halves(token_keys, cos, sin, n, h, is_key, HALF)
            products = tl.dot(q_2, tl.trans(k_2.to(dtype)), input_precision=PRECISION)
            products = tl.dot(q, tl.trans(k.to(dtype)), products, input_precision=PRECISION)
        else:
            k = load_rotated(token_keys, cos, sin, n, d, is_key, D, HALF, INTERLEAVED)
            products = tl.dot(q, tl.trans(k.to(dtype)), input_precision=PRECISION)
        logits = _logits(products, scale, softcap, HAS_CAP)
        logits = tl.where(n[None, :] <= at[:, None], logits, float("-inf"))
        most, total, out = _absorb(logits, v.to(dtype), most, total, out, PRECISION)
        slot = tl.load(slots + begin + n + BLOCK_N, mask=n + BLOCK_N < length, other=0)

    if IF_SERVED:
        after_predecessor(OVERLAP)  # before anything is written; of a block that is not served it is not read
    place = ((tl.program_id(0) * num_kv + kv) * splits + split).to(tl.int64) * ROWS + r
    tl.store(sums + place * 2, most, mask=is_row)
    tl.store(sums + place * 2 + 1, total, mask=is_row)
    tl.store(parts + place[:, None] * DP + d[None, :], out, mask=is_row[:, None])


@triton.jit
def join_splits(
    parts, sums, sink_logits, blocks, served, out, splits,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr, IF_SERVED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [blocks, num_kv_heads, rows]: one row's output from its shares."""
    kv, r = tl.program_id(1), tl.program_id(2)
    num_kv = tl.num_programs(1)
    first, own, _, _ = _bounds(blocks, tl.program_id(0))
    if is_served(served, tl.program_id(0)) != IF_SERVED:
        return
    after_predecessor(OVERLAP)  # which read that too
    query = first + r // GROUP
    if r // GROUP >= own:
        return
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, DP)
    place = ((tl.program_id(0) * num_kv + kv) * splits + s).to(tl.int64) * ROWS + r
    mosts = tl.load(sums + place * 2, mask=s < splits, other=float("-inf"))
    totals = tl.load(sums + place * 2 + 1, mask=s < splits, other=0.0)
    most = tl.max(mosts, axis=0)
    lifts = tl.exp2(mosts - most)
    part = tl.load(parts + place[:, None] * DP + d[None, :], mask=(s < splits)[:, None], other=0.0)
    head = kv * GROUP + r % GROUP
    unit = _with_sink(most, tl.sum(totals * lifts, axis=0), head, sink_logits, HAS_SINKS)
    row = tl.sum(part * lifts[:, None], axis=0) * unit
    tl.store(out + (query * num_kv * GROUP + head) * D + d, row.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def gather_rotated(
    keys, values, slots, cos, sin, blocks, buffer_start, key_buffer, value_buffer, size,
    key_stride, key_head_stride, value_stride, value_head_stride,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALVES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of the longest block, num_kv_heads, blocks]: keys, rotated, and values next to each other."""
    after_predecessor(OVERLAP)
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    _, _, begin, length = _bounds(blocks, b)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) * BLOCK_N >= length:
        return
    d = tl.arange(0, DP)
    is_key = n < length
    slot = tl.load(slots + begin + n, mask=is_key, other=0)
    is_value = is_key[:, None] & (d < D)[None, :]
    v = tl.load((values + kv * value_head_stride + slot * value_stride)[:, None] + d[None, :], mask=is_value, other=0.0)
    token_keys = keys + kv * key_head_stride + slot * key_stride
    first = kv * size + tl.load(buffer_start + b) + n
    place = first[:, None] * DP + d[None, :]
    if HALVES:
        h = tl.arange(0, HALF)
        k, k_2 = load_halves(token_keys, cos, sin, n, h, is_key, HALF)
        half_place = first[:, None] * DP + h[None, :]
        tl.store(key_buffer + half_place, k.to(key_buffer.dtype.element_ty), mask=is_key[:, None])
        tl.store(key_buffer + half_place + HALF, k_2.to(key_buffer.dtype.element_ty), mask=is_key[:, None])
    else:
        k = load_rotated(token_keys, cos, sin, n, d, is_key, D, HALF, INTERLEAVED)
        tl.store(key_buffer + place, k.to(key_buffer.dtype.element_ty), mask=is_key[:, None])
    tl.store(value_buffer + place, v.to(value_buffer.dtype.element_ty), mask=is_key[:, None])


@triton.jit
def attend_many(
    queries, key_buffer, value_buffer, cos, sin, sink_logits, blocks, buffer_start, out,
    scale, softcap, size,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of the longest block's queries, num_q_heads, blocks]: causal attention over gathered rows."""
    after_predecessor(OVERLAP)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see most begin first
    head, b = tl.program_id(1), tl.program_id(2)
    first, own, _, length = _bounds(blocks, b)
    if tile * BLOCK_M >= own:
        return
    d = tl.arange(0, DP)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = m < own
    at = length - own + m
    rows = queries + ((first + m) * tl.num_programs(1) + head) * D
    q = load_rotated(rows, cos, sin, at, d, is_row, D, HALF, INTERLEAVED).to(queries.dtype.element_ty)

    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DP], tl.float32)
    base = ((head // GROUP).to(tl.int64) * size + tl.load(buffer_start + b)) * DP
    n = tl.arange(0, BLOCK_N)
    place = n[:, None] * DP + d[None, :]
    whole = (length - own + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N  # keys that every query of the tile sees
    for start in tl.range(0, whole, BLOCK_N):
        k = tl.load(key_buffer + base + start * DP + place)
        v = tl.load(value_buffer + base + start * DP + place)
        logits = _logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_CAP)
        most, total, acc = _absorb(logits, v, most, total, acc, PRECISION)
    last = tl.minimum(length, length - own + tile * BLOCK_M + BLOCK_M)
    for start in tl.range(whole, last, BLOCK_N):
        is_key = (start + n < length)[:, None]
        k = tl.load(key_buffer + base + start * DP + place, mask=is_key, other=0.0)
        v = tl.load(value_buffer + base + start * DP + place, mask=is_key, other=0.0)
        logits = _logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_CAP)
        logits = tl.where((start + n)[None, :] <= at[:, None], logits, float("-inf"))
        most, total, acc = _absorb(logits, v, most, total, acc, PRECISION)

    acc = acc * _with_sink(most, total, head, sink_logits, HAS_SINKS)[:, None]
    here = out + ((first + m) * tl.num_programs(1) + head)[:, None] * D + d[None, :]
    tl.store(here, acc.to(out.dtype.element_ty), mask=is_row[:, None] & (d < D)[None, :])
