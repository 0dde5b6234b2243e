"""What a selection is made of, worked out afterwards and in plain torch: for traces, never in the way of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances, rotate, scored_keys, vote_logits


def votes_by_head(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    sequence: int,
    candidates: Tensor,
    distances: Sequence[Distances],
    scale: float,
    positions: Tensor,
    context: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_center: Tensor | None = None,
) -> Tensor:
    """Each head's part in the votes that one block gives to some of its candidates.

    Args:
        queries: [1, num_q_heads, head_dim] float32; this, and what is not said here, as `score_tokens` takes it.
        keys: [num_rows, num_kv_heads, head_dim], raw, or an int8 copy.
        pages: where the tokens lie.
        sequence: the block's sequence.
        candidates: [1, 2] int64, first and one past the last position that may be chosen.
        distances: one or more views.
        scale: factor of the logits.
        positions: [k] int64, positions in the sequence.
        context: [1, 2] int64, the positions that a head's softmax covers; the candidates where not given.
        key_scales: [num_rows, num_kv_heads] float32, those of an int8 copy.
        key_center: [num_seqs, num_kv_heads, head_dim] float32, that of an int8 copy.

    Returns:
        [k, num_q_heads] float32 >= 0. Summed over the heads it is what `score_tokens` gives to these candidates where
        it has no horizon; a position that is no candidate has 0.
    """
    first, last = (candidates if context is None else context)[0].tolist()
    lower, upper = candidates[0].tolist()
    rows = scored_keys(keys, pages, sequence, first, last, key_scales, key_center)
    is_candidate = (positions >= lower) & (positions < upper)
    places = (positions - first).clamp(0, last - first - 1)
    total: Tensor = torch.zeros(positions.shape[0], queries.shape[1], device=queries.device)
    for view in distances:
        shares = torch.softmax(vote_logits(queries, rows, view, slice(0, 1))[0] * scale, dim=-1)  # [Hq, T]
        whole = shares[:, lower - first : upper - first].sum().clamp(min=torch.finfo(shares.dtype).tiny)
        total += shares[:, places].T / whole
    return total.masked_fill(~is_candidate[:, None], 0)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    pages: PageTable,
    sequence: int,
    attended: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    interleaved: bool = False,
) -> float:
    """The share of dense attention that falls on the attended tokens, for the last query of a sequence.

    Args:
        query: [num_q_heads, head_dim], raw, of the token at the last of the attended positions.
        keys: [num_rows, num_kv_heads, head_dim], raw, no int8 copy.
        pages: where the tokens lie.
        sequence: the query's sequence.
        attended: [n] int64, ascending positions; the last one is the query's own.
        cos: [at least the query's position + 1, rotary_dim / 2] float32: true positions, as in dense attention.
        sin: like `cos`.
        scale: factor of the logits.
        interleaved: layout of the dimension pairs.

    Returns:
        From 0 to 1, the mean over the heads, by a plain softmax: without soft cap and learned sinks.
    """
    end = int(attended[-1]) + 1
    rows = pages.rows(keys, sequence, 0, end).to(query.device).transpose(0, 1)
    rows = rotate(rows, cos[:end], sin[:end], interleaved)  # [Hkv, T, D]
    own = rotate(query, cos[end - 1], sin[end - 1], interleaved)
    logits = own.view(rows.shape[0], -1, own.shape[-1]) @ rows.transpose(1, 2) * scale  # [Hkv, G, T]
    return float(torch.softmax(logits, dim=-1)[..., attended].sum(-1).mean())
