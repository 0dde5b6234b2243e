"""Other votes than the soft one: which tokens the heads of a layer choose together.

Source: Wu et al., "TokenSelect", EMNLP 2025, equations 5 to 7 and table 4 (plain top-k, one head one vote, soft vote).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tokenselect.methods.selecting import Around, turned_queries
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances, aged

Vote = Callable[[Tensor], Tensor]  # logits [Hq, T] to votes [T]


def sum_of_logits(logits: Tensor) -> Tensor:
    """Plain top-k: heads with large logits outvote the others; from 0 on, for a backend expects that."""
    total = logits.sum(0)
    return total - total.min()


def one_head_one_vote(logits: Tensor, k: int) -> Tensor:
    """Every head names its k best tokens."""
    best = logits.topk(min(k, logits.shape[1])).indices
    return torch.zeros_like(logits).scatter_(1, best, 1.0).sum(0)


def largest_share(logits: Tensor) -> Tensor:
    """A token counts for the head that wants it most."""
    return logits.softmax(-1).amax(0)


def root_of_shares(logits: Tensor) -> Tensor:
    """Square roots let several heads count for more than a single one that is sure."""
    return logits.softmax(-1).sqrt().sum(0)


class OtherVotes(Around):
    """A backend with another vote.

    Args:
        ops: the backend for all else.
        vote: counts the logits of one view; views are normalised and added as in the soft vote.
    """

    def __init__(self, ops: Backend, vote: Vote) -> None:
        super().__init__(ops)
        self._vote = vote

    def score_tokens(
        self,
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
        """As `ops.reference.score_tokens`, for keys as they are cached."""
        votes = []
        for i, (sequence, (first, end)) in enumerate(zip(sequences.tolist(), candidates.tolist(), strict=True)):
            own = pages.rows(keys, sequence, first, end).float()
            views = [self._vote(_logits(turned_queries(queries[i], view, i), own, view) * scale) for view in distances]
            total = torch.stack([view / view.sum().clamp(min=1e-30) for view in views]).sum(0)
            votes.append(aged(total, horizon, prior))
        return torch.cat(votes), torch.nn.functional.pad(candidates.diff()[:, 0].cumsum(0), (1, 0))


def _logits(turned: Tensor, keys: Tensor, view: Distances) -> Tensor:
    """[Hq, T] of queries [runs, Hq, D] against keys [T, Hkv, D]."""
    (runs, heads, dim), (length, num_kv_heads, _) = turned.shape, keys.shape
    size = view.run_size if runs > 1 else length
    padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, runs * size - length)).view(runs, size, num_kv_heads, dim)
    logits = torch.einsum("rhgd,rshd->hgrs", turned.view(runs, num_kv_heads, -1, dim), padded)
    return logits.reshape(heads, runs * size)[:, :length]


def voting(vote: Vote) -> Callable[[Backend], Around]:
    """What makes a backend count votes so."""
    return partial(OtherVotes, vote=vote)
