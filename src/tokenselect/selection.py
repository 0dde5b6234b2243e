"""The method: which cached tokens a block of queries attends (method.md, section 2; Wu et al., Algorithm 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.distances import has_one_distance, has_runs, one_distance, runs_of_keys, take_runs
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances
from tokenselect.rotary import RotaryTable

Select = Callable[..., list[Tensor]]  # `select_tokens`, or what another method does in its place
# A sum over the processes that share a layer's heads; each gets it.
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive queries of one sequence that share a selection.

    Attributes:
        sequence: index of the sequence in the batch.
        start: position of the first query in its sequence.
        end: one past the position of the last one.
        first_query: row of the first query in the batch's queries.
    """

    sequence: int
    start: int
    end: int
    first_query: int

    @property
    def queries(self) -> slice:
        """Rows of this block in the batch's queries."""
        return slice(self.first_query, self.first_query + self.end - self.start)


@dataclass(slots=True)
class SelectionState:
    """What one layer remembers of one sequence: the Selection Cache."""

    query: Tensor | None = None  # [Hq, D], the query of the last selection
    indices: Tensor | None = None  # [k], what it chose
    window_start: int = 0  # where the local window began then: nothing between is lost by reuse
    served: bool | None = None  # whether the last step reused it; None: that was not asked
    lookups: int = 0
    hits: int = 0
    attended: int = 0  # tokens attended by the queries that selected, and tokens that there were for them
    available: int = 0
    other: Tensor | None = None  # what a method that we compare with remembers

    def count(self, num_queries: int, attended: int, available: int) -> None:
        """Note that queries selected anew, without keeping what."""
        self.forget()
        self.served = None
        self.attended += num_queries * attended
        self.available += num_queries * available

    def forget(self) -> None:
        """Drop the last selection, as after the sequence was cut; the counts stay."""
        self.query = self.indices = self.other = None


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """What the layers of one forward pass share: the blocks and, for each, its candidates and distances."""

    blocks: Sequence[Block]
    starts: Tensor  # [num_blocks] int64, first query of each block
    counts: Tensor  # [num_blocks] int64, its queries
    candidates: Tensor  # [num_blocks, 2] int64
    context: Tensor | None  # [num_blocks, 2] int64, where the heads' softmax covers more than the candidates
    sequences: Tensor  # [num_blocks] int64
    distances: Sequence[Distances]
    table: RotaryTable
    may_reuse: Sequence[bool]  # of each block: it is the only query of its sequence, as in a decode step

    def take(self, rows: Sequence[int]) -> SelectionPlan:
        """The plan of some of the blocks."""
        keep = torch.tensor(rows, dtype=torch.int64, device=self.candidates.device)
        return SelectionPlan(
            [self.blocks[row] for row in rows],
            self.starts[keep],
            self.counts[keep],
            self.candidates[keep],
            None if self.context is None else self.context[keep],
            self.sequences[keep],
            [take_runs(view, rows) for view in self.distances],
            self.table,
            [self.may_reuse[row] for row in rows],
        )


def block_starts(start: int, end: int, tail_start: int, block_size: int) -> list[int]:
    """Cut the positions `start .. end - 1` into blocks.

    Blocks begin at multiples of `block_size` in the sequence, whatever part of it is fed at once, so a boundary of
    that part changes only the block that it cuts. From `tail_start` on every query is a block of its own.

    Returns:
        Where the blocks begin, ascending; the first is `start`.
    """
    tail = max(start, min(tail_start, end))
    aligned = range((start // block_size + 1) * block_size, tail, block_size)
    head = [start] if start < tail else []
    return [*head, *aligned, *range(tail, end)]


def plan_selection(
    blocks: Sequence[Block], config: TokenSelectConfig, table: RotaryTable, max_distance: int
) -> SelectionPlan:
    """Work out once per forward pass what every layer needs.

    Args:
        blocks: the blocks that select (`config.covers` none of them).
        config: the settings.
        table: rotations of the model.
        max_distance: largest distance for scoring, in tokens.

    Returns:
        The plan; its tensors lie on the table's device.
    """
    device = table.cos.device
    ends = [candidates_end(block, config) for block in blocks]
    candidates = torch.tensor([[config.num_sink_tokens, end] for end in ends], device=device)
    context = None
    if config.head_weights:
        context = torch.tensor([[0, block.start] for block in blocks], device=device)
    spans = candidates if context is None else context
    starts = torch.tensor([block.start for block in blocks], device=device)
    distances = []
    if has_one_distance(config):
        distances.append(one_distance(len(blocks), config.num_local_tokens, table))
    if has_runs(config):
        distances.append(runs_of_keys(starts, spans, config, max_distance, table))
    sequences = torch.tensor([block.sequence for block in blocks], device=device)
    own = Counter[int]()
    for block in blocks:
        own[block.sequence] += block.end - block.start
    may_reuse = [config.reuse and own[block.sequence] == 1 for block in blocks]
    first_queries = torch.tensor([block.first_query for block in blocks], device=device)
    counts = torch.tensor([block.end - block.start for block in blocks], device=device)
    return SelectionPlan(blocks, first_queries, counts, candidates, context, sequences, distances, table, may_reuse)


def candidates_end(block: Block, config: TokenSelectConfig) -> int:
    """One past the last position that the block may choose: its local window begins there."""
    inside = block.end - block.start if config.local_includes_block else 0
    return block.start - config.num_local_tokens + inside


def select_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    plan: SelectionPlan,
    states: Sequence[SelectionState],
    config: TokenSelectConfig,
    ops: Backend,
    scale: float,
    key_scales: Tensor | None = None,
    key_center: Tensor | None = None,
    reduce: Reduce | None = None,
) -> list[Tensor]:
    """The positions that each block attends in this layer.

    Args:
        queries: [num_queries, num_q_heads, head_dim], raw.
        keys: [num_rows, num_kv_heads, head_dim], raw, or an int8 copy; holds the blocks' own tokens already.
        pages: where each sequence's tokens lie.
        plan: the blocks, from `plan_selection`.
        states: what this layer remembers, by sequence.
        config: the settings.
        ops: the backend.
        scale: factor of the attention logits.
        key_scales: [num_rows, num_kv_heads] float32, those of an int8 copy.
        key_center: [num_seqs, num_kv_heads, head_dim] float32, that of an int8 copy.
        reduce: where heads are spread over processes, the sum over all of them.

    Returns:
        For each block its sinks, selected tokens, local window and itself: int64 positions, ascending.
    """
    k = config.num_selected_tokens
    chosen: dict[int, Tensor] = {}
    if k:
        rows = range(len(plan.blocks))
        missed = [
            row
            for row in rows
            if not (plan.may_reuse[row] and _reuse(queries, keys, plan.blocks[row], states, config, reduce))
        ]
        if missed:
            part = plan if len(missed) == len(plan.blocks) else plan.take(missed)
            positions = choose_tokens(queries, keys, pages, part, config, ops, scale, key_scales, key_center, reduce)
            chosen = dict(zip(missed, positions, strict=True))
    attended = []
    for row, block in enumerate(plan.blocks):
        state, window = states[block.sequence], candidates_end(block, config)
        state.served = row not in chosen if plan.may_reuse[row] else None
        if row in chosen:
            state.indices, state.window_start = chosen[row], window
            state.query = queries[block.queries].float().mean(0) if config.reuse else None
        elif k:
            window = state.window_start
        attended.append(_attended(state.indices if k else None, window, block, config, keys.device))
        own = block.end - block.start
        state.attended += own * attended[-1].shape[0]
        state.available += own * block.end
    return attended


def choose_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    plan: SelectionPlan,
    config: TokenSelectConfig,
    ops: Backend,
    scale: float,
    key_scales: Tensor | None = None,
    key_center: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """The candidates of each block with the most votes, whatever was selected before; arguments as `select_tokens`.

    Returns:
        [num_blocks, k] int64 positions, ascending.
    """
    table = plan.table
    pooled = ops.pool_queries(queries, plan.starts, plan.counts, table.cos, table.sin, table.interleaved)
    votes, start_loc = ops.score_tokens(
        pooled,
        keys,
        pages,
        plan.sequences,
        plan.candidates,
        plan.distances,
        vote_scale(scale, table, config),
        plan.context,
        key_scales,
        key_center,
        config.vote_horizon,
        config.vote_prior,
    )
    if reduce is not None:  # each process has as many heads, so its votes weigh as much
        votes = reduce(votes)
    if config.smoothing_window > 1:
        votes = _smooth(votes, start_loc, config.smoothing_window)
    return ops.topk_tokens(votes, start_loc, config.num_selected_tokens) + config.num_sink_tokens


def vote_scale(scale: float, table: RotaryTable, config: TokenSelectConfig) -> float:
    """Factor of the logits of the vote, for a factor `scale` of the attention logits."""
    added = 1 + config.position_free_weight if config.scoring == "merged" else 1  # the rotation gives the mean
    return added * (scale * table.attention_factor**2 if config.scale_votes else 1.0)


def _reuse(
    queries: Tensor,
    keys: Tensor,
    block: Block,
    states: Sequence[SelectionState],
    config: TokenSelectConfig,
    reduce: Reduce | None,
) -> bool:
    """Whether a decode step's query is so like that of the last selection that this one serves again."""
    state = states[block.sequence]
    state.lookups += 1
    if state.query is None or block.start - state.window_start >= 2 * config.num_local_tokens:
        return False
    parts = keys.shape[1] if config.reuse_test == "group_min" else 1
    now, then = (q.float().reshape(parts, -1) for q in (queries[block.first_query], state.query))
    alike = torch.cosine_similarity(now, then, dim=-1).min() >= config.reuse_threshold
    hit = bool(alike if reduce is None else reduce((~alike).float().view(1)) == 0)  # all processes, or none
    state.hits += hit
    return hit


def _attended(
    indices: Tensor | None, window: int, block: Block, config: TokenSelectConfig, device: torch.device
) -> Tensor:
    sinks = torch.arange(min(config.num_sink_tokens, window), device=device)
    recent = torch.arange(window, block.end, device=device)
    return torch.cat((sinks, recent) if indices is None else (sinks, indices, recent))


def _smooth(votes: Tensor, start_loc: Tensor, width: int) -> Tensor:
    pool = torch.nn.functional.max_pool1d
    parts = [votes[a:b] for a, b in pairwise(start_loc.tolist())]
    return torch.cat([pool(part[None], width, 1, width // 2)[0] for part in parts])
