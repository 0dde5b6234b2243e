"""The operations in plain torch: the definition that every backend is tested against.

All of them work on ragged batches of *blocks* (runs of queries of one sequence that share a selection) and on paged
caches. Source of the formulas: method.md; Wu et al., "TokenSelect", EMNLP 2025, equations 5 to 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tokenselect.ops.paging import PageTable
from tokenselect.ops.paging import fill_slots as fill_slots
from tokenselect.ops.paging import range_slots as range_slots
from tokenselect.ops.paging import write_rows as write_rows
from tokenselect.ops.resident import claim_rows as claim_rows
from tokenselect.ops.resident import move_rows as move_rows

NAME = "reference"


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run there; None: it can."""
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first dimensions of `x`, pair by pair; the rest passes through (partial rotary).

    Args:
        x: [..., head_dim].
        cos: [..., rotary_dim / 2], broadcastable to `x` without its last dimension; computed in its dtype.
        sin: like `cos`.
        interleaved: dimension pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...

    Returns:
        Shape of `x`, in the dtype of `cos`.

    Source: Su et al., "RoFormer", equation 34.
    """
    half = cos.shape[-1]
    x = x.to(cos.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((out, rest.expand(*out.shape[:-1], -1)), dim=-1) if rest.shape[-1] else out


def pool_queries(
    queries: Tensor, starts: Tensor, counts: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """One query per block: the mean of its queries, each rotated by its place in the block (method.md, section 2.2).

    Args:
        queries: [num_queries, num_q_heads, head_dim], raw.
        starts: [num_blocks] int64, first query of each block.
        counts: [num_blocks] int64, queries of each block, at least 1.
        cos: [at least the largest count, rotary_dim / 2] float32, rotations by 0, 1, 2, ...
        sin: like `cos`.
        interleaved: layout of the dimension pairs.

    Returns:
        [num_blocks, num_q_heads, head_dim] float32.
    """
    pooled = queries[starts].float()  # a rotation by 0
    for i, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        if count > 1:
            own = queries[start : start + count]
            pooled[i] = rotate(own, cos[:count, None], sin[:count, None], interleaved).mean(0)
    return pooled


@dataclass(frozen=True, slots=True)
class Distances:
    """Rotations that stand for the distance from a block's start to its keys, one per run of keys.

    Attributes:
        cos: [sum of runs, rotary_dim / 2] float32.
        sin: same shape.
        run_size: keys per run; one run of any size is position-free scoring.
        run_start_loc: [num_blocks + 1] int64: the runs of block `i` are `run_start_loc[i] .. run_start_loc[i + 1] - 1`.
        interleaved: layout of the dimension pairs.
        alike: [num_blocks] int64, how many of each block's first runs have the same rotation; None: not known.
    """

    cos: Tensor
    sin: Tensor
    run_size: int
    run_start_loc: Tensor
    interleaved: bool = False
    alike: Tensor | None = None


def score_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    sequences: Tensor,
    candidates: Tensor,
    distances: Sequence[Distances],
    scale: float,
    context: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_center: Tensor | None = None,
    horizon: float = 0.0,
    prior: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """All heads of a block vote for the cached tokens that matter (the soft vote).

    For each view of the distances: `votes[t] = sum_h softmax_t(scale * <R q[h], k[h // group][t]>)`, where R rotates
    by the distance that the view gives to t's run. Views are normalised to a sum of 1 and added (the mix).

    Args:
        queries: [num_blocks, num_q_heads, head_dim] float32, one pooled query per block and head, rotated as if
            the block's first token stood at position 0.
        keys: [num_rows, num_kv_heads, head_dim], raw (before rotary embedding), any strides.
        pages: where each sequence's tokens lie.
        sequences: [num_blocks] int64, the sequence of each block.
        candidates: [num_blocks, 2] int64, first and one past the last position that may be chosen.
        distances: one or more views; runs start at the first position of the context.
        scale: factor of the logits.
        context: [num_blocks, 2] int64, what a head's softmax covers: no less than the candidates; default: no more.
        key_scales: [num_rows, num_kv_heads] float32, where `keys` are an int8 copy: a key is its integers times this.
        key_center: [num_seqs, num_kv_heads, head_dim] float32, to be added to the keys of an int8 copy.
        horizon, prior: `(vote + prior) * horizon / (horizon + age)` counts, see `aged`; no horizon: the vote alone.

    Returns:
        votes: [sum of candidates] float32 >= 0; with no prior, a block's sum to at most the number of views.
        start_loc: [num_blocks + 1] int64, where each block's votes begin.
    """
    context = candidates if context is None else context
    votes = []
    for group in _same_first(list(zip(sequences.tolist(), context[:, 0].tolist(), strict=True))):
        ends = context[group, 1]
        first, last = int(context[group.start, 0]), int(ends.max())
        sequence = int(sequences[group.start])
        rows = scored_keys(keys, pages, sequence, first, last, key_scales, key_center)
        outside = torch.arange(first, last, device=keys.device) >= ends[:, None]  # [N, T]
        bounds = candidates[group] - first
        total = torch.zeros(outside.shape, device=keys.device)
        for view in distances:
            logits = vote_logits(queries[group], rows, view, group) * scale
            logits.masked_fill_(outside[:, None], float("-inf"))
            total += _normalised(torch.softmax(logits, dim=-1).sum(1), bounds)
        votes += [aged(row[low:high], horizon, prior) for row, (low, high) in zip(total, bounds.tolist(), strict=True)]
    return torch.cat(votes), _start_loc(candidates[:, 1] - candidates[:, 0])


def aged(votes: Tensor, horizon: float, prior: float) -> Tensor:
    """Votes [T] as they count: the prior is added, and they count less by their age, 1 for the last candidate."""
    age = torch.arange(votes.shape[-1], 0, -1, dtype=torch.float32, device=votes.device)
    return (votes + prior) * (horizon / (horizon + age)) if horizon else votes


def scored_keys(
    keys: Tensor,
    pages: PageTable,
    sequence: int,
    start: int,
    end: int,
    key_scales: Tensor | None,
    key_center: Tensor | None,
) -> Tensor:
    """Keys [num_kv_heads, end - start, head_dim] float32 of a sequence, those of an int8 copy as it stands for them."""
    rows = pages.rows(keys, sequence, start, end).transpose(0, 1).float()
    if key_scales is not None:
        rows = rows * pages.rows(key_scales, sequence, start, end).T[:, :, None]
    return rows if key_center is None else rows + key_center[sequence][:, None]


_GROUP = 16  # blocks scored together: one read of the keys, and logits that stay small


def _same_first(firsts: list[tuple[int, int]]) -> Iterator[slice]:
    """Runs of blocks whose contexts begin at the same token (sequence, position)."""
    start = 0
    for end in range(1, len(firsts) + 1):
        if end == len(firsts) or firsts[end] != firsts[start] or end - start == _GROUP:
            yield slice(start, end)
            start = end


def _normalised(votes: Tensor, bounds: Tensor) -> Tensor:
    """Votes [N, T] of one view, those of each block's candidates divided by their sum."""
    position = torch.arange(votes.shape[1], device=votes.device)
    inside = (position >= bounds[:, :1]) & (position < bounds[:, 1:])
    total = (votes * inside).sum(-1, keepdim=True)
    return votes / total.clamp(min=torch.finfo(total.dtype).tiny)  # 0 where every head looks elsewhere


def vote_logits(queries: Tensor, rows: Tensor, view: Distances, group: slice) -> Tensor:
    """Logits [N, Hq, T] of pooled queries [N, Hq, D] against rows [Hkv, T, D], each run at its own distance."""
    turned = _turned(queries, view, group)  # [N, Hq, R, D]
    num_kv_heads, length, dim = rows.shape
    blocks, heads, runs, _ = turned.shape
    turned = turned.view(blocks, num_kv_heads, -1, runs, dim).permute(1, 3, 0, 2, 4).flatten(2, 3)  # [Hkv, R, N*G, D]
    if runs == 1:
        logits = turned[:, 0] @ rows.transpose(1, 2)  # [Hkv, N*G, T]
    else:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, runs * view.run_size - length))
        rows = rows.view(num_kv_heads, runs, view.run_size, dim)
        logits = (turned @ rows.transpose(2, 3)).transpose(1, 2).flatten(2)[:, :, :length]
    return logits.view(num_kv_heads, blocks, -1, length).transpose(0, 1).reshape(blocks, heads, length)


def _turned(queries: Tensor, view: Distances, group: slice) -> Tensor:
    """Queries [N, Hq, R, D] rotated for each run; a block with fewer runs repeats its last one."""
    begin = view.run_start_loc[group.start : group.stop + 1]
    counts = begin.diff()
    run = torch.arange(int(counts.max()), device=queries.device).minimum(counts[:, None] - 1) + begin[:-1, None]
    return rotate(queries[:, :, None], view.cos[run][:, None], view.sin[run][:, None], view.interleaved)


def quantize_rows(
    rows: Tensor, center: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The int8 copy of keys that `score_tokens` may read: half the bytes of 16-bit keys.

    Channels that are large in every token would leave few bits for what differs between tokens, so keys are counted
    from a center, such as the mean of the first ones.

    Args:
        rows: [num_rows, num_kv_heads, head_dim], any strides.
        center: [num_kv_heads, head_dim] float32; 0 where not given.
        out: where to write the results, any strides between rows and heads; made if not given.

    Returns:
        integers: [num_rows, num_kv_heads, head_dim] int8, -127 .. 127.
        scales: [num_rows, num_kv_heads] float32 > 0; a key is about its integers times its scale, plus the center.
    """
    wide = rows.float() if center is None else rows.float() - center
    scales = wide.abs().amax(-1).clamp(min=1e-30) / 127
    integers = (wide / scales[..., None]).round().to(torch.int8)
    return (integers, scales) if out is None else (out[0].copy_(integers), out[1].copy_(scales))


def quantize_into(
    rows: Tensor, tokens: Tensor, centers: Tensor, owners: Tensor, integers: Tensor, scales: Tensor, into: Tensor
) -> None:
    """Write the int8 copy of some rows, each counted from its own center, to rows of another cache.

    Args:
        rows: [num_rows, num_kv_heads, head_dim], any strides between rows and heads.
        tokens: [num_tokens] int64, which rows.
        centers: [num_centers, num_kv_heads, head_dim] float32.
        owners: [num_tokens] int64, which center.
        integers: [num_copies, num_kv_heads, head_dim] int8, any strides between rows and heads.
        scales: [num_copies, num_kv_heads] float32, any strides.
        into: [num_tokens] int64, rows of `integers` and `scales`, each once.
    """
    integers[into], scales[into] = quantize_rows(rows[tokens].float() - centers[owners])


def topk_tokens(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    """The `k` candidates of each block with the most votes.

    Args:
        votes: [sum of candidates] float32, no NaN.
        start_loc: [num_blocks + 1] int64, where each block's votes begin; every block has at least `k`.
        k: how many to choose, at least 1.

    Returns:
        [num_blocks, k] int64, ascending offsets into the block's candidates; ties go to the lowest.
    """
    return torch.stack([_topk(votes[a:b], k) for a, b in pairwise(start_loc.tolist())])


def _topk(votes: Tensor, k: int) -> Tensor:
    least = votes.kthvalue(votes.shape[0] - k + 1).values
    above, equal = votes > least, votes == least
    wanted = k - above.sum()
    return (above | (equal & (equal.cumsum(0) <= wanted))).nonzero()[:, 0]


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start_loc: Tensor,
    slots: Tensor,
    slot_start_loc: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    interleaved: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over the chosen rows, at re-indexed positions: the i-th attended token gets position i.

    The last rows of a block are its own tokens, in order; a query sees those up to itself.

    Args:
        queries: [num_queries, num_q_heads, head_dim], raw.
        keys: [num_rows, num_kv_heads, head_dim], raw, any strides.
        values: like `keys`.
        query_start_loc: [num_blocks + 1] int64, where each block's queries begin.
        slots: [sum of attended] int64, rows of the cache, by position.
        slot_start_loc: [num_blocks + 1] int64, where each block's slots begin.
        cos: [at least the most attended, rotary_dim / 2] float32 (method.md, section 2.5).
        sin: like `cos`.
        scale: factor of the logits.
        interleaved: layout of the dimension pairs.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sink_logits: [num_q_heads], a learned logit per head that takes part in the softmax only (gpt-oss).
        out: like `queries`, contiguous: where the result goes; a new tensor where not given.

    Returns:
        [num_queries, num_q_heads, head_dim] in the dtype of `queries`; zero for queries that belong to no block.
    """
    out = queries.new_zeros(queries.shape) if out is None else out.zero_()
    query_bounds, slot_bounds = query_start_loc.tolist(), slot_start_loc.tolist()
    for i in range(len(query_bounds) - 1):
        block = slice(query_bounds[i], query_bounds[i + 1])
        chosen = slots[slot_bounds[i] : slot_bounds[i + 1]]
        length, own = chosen.shape[0], block.stop - block.start
        c, s = cos[:length], sin[:length]
        k = rotate(gather_rows(keys, chosen), c, s, interleaved).to(queries.dtype)
        q = rotate(queries[block].transpose(0, 1), c[length - own :], s[length - own :], interleaved) * scale
        v = gather_rows(values, chosen)
        q = q.to(queries.dtype)
        for first in range(0, own, _QUERIES_AT_ONCE):  # logits that stay small
            last = min(first + _QUERIES_AT_ONCE, own)
            seen = slice(length - own + last)
            attended = causal_attention(
                q[:, first:last], k[:, seen], v[:, seen], softcap=softcap, sink_logits=sink_logits
            )
            out[block.start + first : block.start + last] = attended.transpose(0, 1)
    return out


_QUERIES_AT_ONCE = 512


def gather_rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows [num_kv_heads, len(slots), head_dim] of a cache [num_rows, num_kv_heads, head_dim]."""
    heads, step = cache.shape[1], cache.stride(0)
    if cache.stride(1) % step == 0 and step == cache.shape[2]:
        # One head after the other: rows of all heads are rows of one matrix, which gathers without a strided copy.
        matrix = cache.as_strided((cache.stride(1) // step * (heads - 1) + cache.shape[0], step), (step, 1))
        offsets = torch.arange(heads, device=slots.device)[:, None] * (cache.stride(1) // step)
        return matrix.index_select(0, (offsets + slots).flatten()).view(heads, -1, step)
    return cache[slots].transpose(0, 1)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the last queries of a sequence, one KV head at a time so that the logits stay small.

    Args:
        q: [num_q_heads, num_queries, head_dim], rotated and scaled; query `i` sees keys `0 .. T - num_queries + i`.
        k: [num_kv_heads, T, head_dim], rotated.
        v: like `k`.
        softcap: see `sparse_attention`.
        sink_logits: see `sparse_attention`.

    Returns:
        [num_q_heads, num_queries, head_dim].
    """
    heads, own, dim = q.shape
    num_kv_heads, length, _ = k.shape
    group = heads // num_kv_heads
    future = torch.full((own, own), float("-inf"), dtype=q.dtype, device=q.device).triu(1) if own > 1 else None
    grouped = q.reshape(num_kv_heads, group * own, dim)
    out = torch.empty_like(grouped)
    logits = q.new_empty(group * own, length)
    weights = torch.empty_like(logits)
    for head in range(num_kv_heads):
        torch.matmul(grouped[head], k[head].T, out=logits)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if future is not None:
            logits.view(group, own, length)[:, :, length - own :] += future
        if sink_logits is None:
            torch.softmax(logits, dim=-1, out=weights)
        else:
            sinks = sink_logits.view(num_kv_heads, group, 1, 1)[head].expand(group, own, 1).reshape(-1, 1)
            weights = torch.softmax(torch.cat((logits, sinks.to(logits)), dim=-1), dim=-1)[:, :-1]
        torch.matmul(weights, v[head], out=out[head])
    return out.view(heads, own, dim)


def _start_loc(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
