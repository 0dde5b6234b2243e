"""Other choices from the same votes: the last block's votes count too, or fewer tokens where few have the votes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Around
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.selection import SelectionPlan, SelectionState, candidates_end, select_tokens


class _WithPrior(Around):
    def __init__(self, ops: Backend, state: SelectionState, weight: float) -> None:
        super().__init__(ops)
        self._state, self._weight = state, weight

    def score_tokens(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        votes, start_loc = self.ops.score_tokens(*arguments)
        if (before := self._state.other) is not None:
            known = min(len(before), len(votes))
            votes[:known] += self._weight * before[:known]
        self._state.other = votes / (1 + self._weight)
        return votes, start_loc


def select_with_prior(
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
    """As `selection.select_tokens`; votes of the block before count half, those before it a quarter, and so on."""
    attended = []
    for i, block in enumerate(plan.blocks):
        own: Any = _WithPrior(ops, states[block.sequence], 0.5)
        attended += select_tokens(queries, keys, pages, plan.take([i]), states, config, own, scale, *copy)
    return attended


class _Remembering(Around):
    votes: list[Tensor]

    def score_tokens(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        votes, start_loc = self.ops.score_tokens(*arguments)
        self.votes = [votes[a:b].clone() for a, b in pairwise(start_loc.tolist())]
        return votes, start_loc


class TopP:
    """As `selection.select_tokens`, but only the best tokens that hold a share of the votes, at most k.

    Source: Lin et al., "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning", 2025 (arXiv
    2502.02770).

    Args:
        share: of the votes of all candidates.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        pages: PageTable,
        plan: SelectionPlan,
        states: Sequence[SelectionState],
        config: TokenSelectConfig,
        ops: Backend,
        *rest: Any,
    ) -> list[Tensor]:
        own: Any = _Remembering(ops)
        whole = select_tokens(queries, keys, pages, plan, states, config, own, *rest)
        attended = []
        for block, positions, votes in zip(plan.blocks, whole, own.votes, strict=True):
            first, window = config.num_sink_tokens, candidates_end(block, config)
            chosen = positions[(positions >= first) & (positions < window)]
            attended.append(
                torch.cat((positions[:first], self._best(chosen, votes, first), positions[positions >= window]))
            )
            states[block.sequence].attended -= (block.end - block.start) * (len(positions) - len(attended[-1]))
        return attended

    def _best(self, chosen: Tensor, votes: Tensor, first: int) -> Tensor:
        ranked, order = votes[chosen - first].sort(descending=True)
        before = ranked.cumsum(0) - ranked
        return chosen[order[before < self.share * votes.sum()]].sort().values
