"""The operations as opaque nodes of `torch.compile`, with fake implementations that tell shapes.

Called straight outside of compilation: the dispatcher would cost more than a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenselect.ops.gpu import attention, score, topk
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances


@torch.library.custom_op("tokenselect::gpu_score_tokens", mutates_args=())
def score_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    page_size: int,
    padding: list[int],
    sequences: Tensor,
    candidates: Tensor,
    cos: list[Tensor],
    sin: list[Tensor],
    run_sizes: list[int],
    run_start_loc: list[Tensor],
    interleaved: bool,
    scale: float,
    context: Tensor | None,
    key_scales: Tensor | None,
    key_center: Tensor | None,
    horizon: float,
    prior: float,
) -> tuple[Tensor, Tensor]:
    """`score_tokens` with its pages and distances as plain tensors and numbers."""
    views = [
        Distances(c, s, size, runs, interleaved)
        for c, s, size, runs in zip(cos, sin, run_sizes, run_start_loc, strict=True)
    ]
    table = PageTable(pages, page_size, padding)
    votes, start_loc = score.score_tokens(
        queries, keys, table, sequences, candidates, views, scale, context, key_scales, key_center, horizon, prior
    )
    return votes, start_loc.clone()  # ours is kept for the next layer


@score_tokens.register_fake
def _(queries: Tensor, keys: Tensor, pages: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    votes = queries.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)
    return votes, pages.new_empty(queries.shape[0] + 1, dtype=torch.int64)


@torch.library.custom_op("tokenselect::gpu_topk_tokens", mutates_args=())
def topk_tokens(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    """`topk_tokens`."""
    return topk.topk_tokens(votes, start_loc, k)


@topk_tokens.register_fake
def _(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    return votes.new_empty((start_loc.shape[0] - 1, k), dtype=torch.int64)


@torch.library.custom_op("tokenselect::gpu_sparse_attention", mutates_args=())
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
    interleaved: bool,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`sparse_attention`."""
    return attention.sparse_attention(
        queries,
        keys,
        values,
        query_start_loc,
        slots,
        slot_start_loc,
        cos,
        sin,
        scale,
        interleaved=interleaved,
        softcap=softcap,
        sink_logits=sink_logits,
    )


@sparse_attention.register_fake
def _(queries: Tensor, *rest: object) -> Tensor:
    return queries.new_empty(queries.shape)
