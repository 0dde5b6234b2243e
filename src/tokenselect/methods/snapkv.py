"""SnapKV: the last queries decide which tokens are kept; the others are gone for good.

The attention of the last 64 queries of a block is summed over queries and heads and averaged over 5 neighbouring
tokens; the best k survive. Other than in the paper this happens at every block of a prompt, before it attends, for
dense attention cannot read the prompt beyond the window; one set of tokens serves all heads; and kept tokens are
attended at re-indexed positions. An answer's tokens vote for nothing: they push out the oldest of the local ones.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024 (arXiv 2404.14469),
section 4 and listing 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.rotation import rotations
from tokenselect.methods.selecting import Choice
from tokenselect.ops.reference import gather_rows, rotate
from tokenselect.selection import candidates_end

if TYPE_CHECKING:
    from tokenselect.ops import Backend
    from tokenselect.ops.paging import PageTable
    from tokenselect.rotary import RotaryTable
    from tokenselect.selection import Block, SelectionPlan, SelectionState

OBSERVED_QUERIES = 64
POOLED_TOKENS = 5


def attention_received(queries: Tensor, keys: Tensor, table: RotaryTable, scale: float) -> Tensor:
    """How much attention each token gets from the last queries.

    Args:
        queries: [n, Hq, D], raw, those of the last n tokens.
        keys: [Hkv, T, D], raw, by position.
        table: rotations; tokens stand at the positions 0 .. T - 1.
        scale: factor of the logits.

    Returns:
        [T] float32, which sums to n * Hq.
    """
    count, length = queries.shape[0], keys.shape[1]
    cos, sin = rotations(table, torch.arange(length, device=keys.device))
    k = rotate(keys, cos, sin, table.interleaved)
    q = rotate(queries.transpose(0, 1), cos[length - count :], sin[length - count :], table.interleaved)
    logits = q.reshape(k.shape[0], -1, count, q.shape[-1]) @ k[:, None].transpose(2, 3) * scale  # [Hkv, group, n, T]
    future = torch.ones(count, length, dtype=torch.bool, device=keys.device).triu(length - count + 1)
    received: Tensor = logits.masked_fill(future, float("-inf")).softmax(-1).sum((0, 1, 2))
    return received


def evict_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    plan: SelectionPlan,
    states: Sequence[SelectionState],
    config: TokenSelectConfig,
    ops: Backend,
    scale: float,
    *copy: Tensor | None,
) -> list[Tensor]:
    """As `selection.select_tokens`, but what was not chosen once is not chosen again."""
    attended = []
    for block in plan.blocks:
        state, window = states[block.sequence], candidates_end(block, config)
        if block.end - block.start == 1 and state.indices is not None:
            state.window_start = max(state.window_start, block.end - 2 * config.num_local_tokens)
        else:
            kept = _survivors(state, window, config, keys.device)
            if kept.shape[0] > config.num_selected_tokens:
                kept = _strongest(kept, queries, keys, pages, plan, block, window, config, scale)
            state.indices, state.window_start = kept, window
        attended.append(_attended(state, block, config, keys.device))
        own = block.end - block.start
        state.attended += own * attended[-1].shape[0]
        state.available += own * block.end
    return attended


def _survivors(state: SelectionState, window: int, config: TokenSelectConfig, device: torch.device) -> Tensor:
    """What was kept, and what left the local window since; at first everything."""
    if state.indices is None:
        return torch.arange(config.num_sink_tokens, window, device=device)
    return torch.cat((state.indices, torch.arange(state.window_start, window, device=device)))


def _strongest(
    survivors: Tensor,
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    plan: SelectionPlan,
    block: Block,
    window: int,
    config: TokenSelectConfig,
    scale: float,
) -> Tensor:
    sinks = torch.arange(config.num_sink_tokens, device=keys.device)
    positions = torch.cat((sinks, survivors, torch.arange(window, block.end, device=keys.device)))
    observed = queries[block.queries][-OBSERVED_QUERIES:]
    rows = gather_rows(keys, pages.slots(block.sequence, positions))
    received = attention_received(observed, rows, plan.table, scale)[len(sinks) : len(sinks) + len(survivors)]
    pooled = torch.nn.functional.avg_pool1d(received[None], POOLED_TOKENS, 1, POOLED_TOKENS // 2)[0]
    return survivors[pooled.topk(config.num_selected_tokens).indices.sort().values]


def _attended(state: SelectionState, block: Block, config: TokenSelectConfig, device: torch.device) -> Tensor:
    assert state.indices is not None
    sinks = torch.arange(config.num_sink_tokens, device=device)
    return torch.cat((sinks, state.indices, torch.arange(state.window_start, block.end, device=device)))


def _settings(config: TokenSelectConfig) -> TokenSelectConfig:
    # A threshold of 1 says that a decode step may reach back as far as the Selection Cache's: the budget counts it.
    return config.replace(
        num_dense_tokens=0,
        num_tail_tokens=0,
        scoring="position_free",
        score_dtype="same",
        reuse_threshold=1.0,
        local_includes_block=False,
    )


SNAPKV = Choice(_settings, select=evict_tokens)
