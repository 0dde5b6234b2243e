"""InfLLM: blocks of the far context, each known by the keys of a few representative tokens.

A memory block of 128 tokens keeps, for each key head, the 4 tokens that the queries after it look at most; its score is
the product of the block's mean query with the mean of their keys, summed over heads, all keys at one distance, and the
best memory blocks are attended whole. Other than in the paper, "the queries after it" are those of the block of queries
at which a memory block leaves the local window, and a last memory block that is not full yet is ranked like the others.

Source: Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
NeurIPS 2024 (arXiv 2402.04617), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Choice, turned_queries
from tokenselect.selection import candidates_end

if TYPE_CHECKING:
    from tokenselect.ops import Backend
    from tokenselect.ops.paging import PageTable
    from tokenselect.selection import Block, SelectionPlan, SelectionState

MEMORY_BLOCK = 128
NUM_REPRESENTATIVES = 4


def representatives(query: Tensor, keys: Tensor) -> Tensor:
    """The mean of each memory block's representative keys.

    Args:
        query: [Hq, D], the mean of the queries that follow.
        keys: [T, Hkv, D], T at least 1; the last memory block may be short.

    Returns:
        [memory blocks, Hkv, D] float32.
    """
    grouped = query.float().view(keys.shape[1], -1, keys.shape[2]).sum(1)  # [Hkv, D]: heads of a group look together
    means = []
    for block in torch.split(keys.float(), MEMORY_BLOCK):
        best = (block * grouped).sum(-1).topk(min(NUM_REPRESENTATIVES, len(block)), dim=0).indices  # [r, Hkv]
        means.append(block.gather(0, best[..., None].expand(-1, -1, block.shape[-1])).mean(0))
    return torch.stack(means)


def select_blocks(
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
    """As `selection.select_tokens`; of a short last memory block fewer tokens are attended."""
    attended = []
    for i, block in enumerate(plan.blocks):
        state, window, first = states[block.sequence], candidates_end(block, config), config.num_sink_tokens
        mean = queries[block.queries].float().mean(0)
        query = turned_queries(mean, plan.distances[0], i)[0]
        memory = _remember(query, keys, pages, state, block, first, window)
        scores = torch.einsum("mhd,hd->m", memory, query.view(memory.shape[1], -1, memory.shape[2]).sum(1))
        best = scores.topk(min(config.num_selected_tokens // MEMORY_BLOCK, len(scores))).indices.sort().values
        chosen = (best[:, None] * MEMORY_BLOCK + torch.arange(MEMORY_BLOCK, device=best.device)).flatten() + first
        sinks, recent = (torch.arange(*ends, device=best.device) for ends in ((0, first), (window, block.end)))
        attended.append(torch.cat((sinks, chosen[chosen < window], recent)))
        own = block.end - block.start
        state.attended += own * attended[-1].shape[0]
        state.available += own * block.end
    return attended


def _remember(
    query: Tensor, keys: Tensor, pages: PageTable, state: SelectionState, block: Block, first: int, window: int
) -> Tensor:
    """The means of all memory blocks so far; those of full ones stay."""
    known = 0 if state.other is None else state.other.shape[0]
    begin = first + known * MEMORY_BLOCK
    if begin >= window:
        assert state.other is not None
        return state.other
    new = representatives(query, pages.rows(keys, block.sequence, begin, window))
    memory = new if state.other is None else torch.cat((state.other, new))
    state.other = memory[: (window - first) // MEMORY_BLOCK]
    return memory


def _settings(config: TokenSelectConfig) -> TokenSelectConfig:
    k = -(-config.num_selected_tokens // MEMORY_BLOCK) * MEMORY_BLOCK
    return config.replace(
        num_selected_tokens=k,
        num_dense_tokens=0,
        scoring="position_free",
        score_dtype="same",
        reuse_threshold=2.0,
        local_includes_block=False,
    )


INFLLM = Choice(_settings, select=select_blocks)
