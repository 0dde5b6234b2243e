"""`topk_tokens`: the exact most voted of all candidates, in the order of their positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.buffers import num_copies
from benchmarks.operations.case import Call, Case
from tokenselect.config import TokenSelectConfig
from tokenselect.ops import Backend
from tokenselect.ops.reference import aged

_K = 2048
_CONFIG = TokenSelectConfig()


class TopK(Case):
    """The top 2,048 of votes that are spread as a softmax spreads them, most near nothing, and count by their age."""

    def __init__(self, name: str, length: int) -> None:
        self.key = {"operation": "topk_tokens", "shape": name, "length": length}
        self.num_variants, self.num_bytes = num_copies(4 * length), 4 * length
        shares = torch.randn(self.num_variants, length).mul_(2).softmax(-1)
        self.votes = aged(shares, _CONFIG.vote_horizon, _CONFIG.vote_prior)
        self.start_loc = torch.tensor([0, length])
        self.pools = [self.votes]

    def compute(self, ops: Backend, variant: int) -> Tensor:
        """[1, k] ascending indices."""
        return ops.topk_tokens(self.votes[variant], self.start_loc, _K)

    def baselines(self) -> dict[str, Call]:
        """torch's own, whose order among equal votes is its own too."""
        return {"torch.topk + sort": lambda i: torch.topk(self.votes[i], _K, sorted=False).indices.sort().values[None]}

    def difference(self, result: Any, expected: Any) -> str | None:
        """The same votes, by ascending position; which of two equal votes was taken is tested in tests/ops."""
        ascending = bool((result.diff() > 0).all())
        same = torch.equal(self.votes[0][result[0]].sort().values, self.votes[0][expected[0]].sort().values)
        return None if ascending and same else "not the tokens with the most votes, ascending"


def cases(length: int) -> Iterator[TopK]:
    """The number of heads is gone when votes are counted: one case for all shapes."""
    yield TopK("any", length)
