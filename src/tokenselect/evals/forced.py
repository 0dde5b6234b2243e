"""The ceiling of a selection: the same run with given tokens forced into every selection that may choose them.

What is still answered wrong then is the model's own mistake, not the selection's. Nothing of this is in the way of a
run without it: the backend of one entered model is wrapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from tokenselect.integrations.transformers import TokenSelect
    from tokenselect.ops import Backend

_LARGE = 1e30  # more than any vote, which is at most the number of heads


class ForcedBackend:
    """A backend whose top-k takes given positions first; all else is the backend's own.

    Args:
        ops: the backend.
        num_sink_tokens: position of the first candidate.

    Attributes:
        positions: [n] int64, positions in the sequence; set it before each prompt. Batches of one sequence only.
    """

    def __init__(self, ops: Backend, num_sink_tokens: int) -> None:
        self._ops, self._first = ops, num_sink_tokens
        self.positions = torch.empty(0, dtype=torch.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def topk_tokens(self, votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
        """As `ops.reference.topk_tokens`, with the forced positions among the candidates chosen in any case."""
        candidates = self.positions.to(start_loc.device) - self._first
        rows = start_loc[:-1, None] + candidates[candidates >= 0]
        forced = rows[rows < start_loc[1:, None]]
        votes = votes.index_fill(0, forced.to(votes.device), _LARGE)
        return self._ops.topk_tokens(votes, start_loc, k)


def force(selection: TokenSelect) -> ForcedBackend:
    """Wrap the backend of a `TokenSelect` that has not been entered yet.

    Returns:
        The wrapper, whose `positions` the caller sets.
    """
    backend = ForcedBackend(selection.ops, selection.config.num_sink_tokens)
    selection.ops = backend  # type: ignore[assignment]
    return backend


def token_positions(offsets: list[tuple[int, int]], prompt: str, needles: tuple[str, ...]) -> list[int]:
    """Which tokens of a prompt are those of its needles.

    Args:
        offsets: first and one past the last character of each token.
        prompt: the text.
        needles: parts of it.

    Returns:
        Positions of the tokens that share a character with a needle, ascending.

    Raises:
        ValueError: the prompt does not have the needle.
    """
    found: set[int] = set()
    for needle in needles:
        start = prompt.find(needle)
        if start < 0:
            raise ValueError(f"the prompt does not hold the needle {needle!r}")
        end = start + len(needle)
        found.update(i for i, (first, last) in enumerate(offsets) if first < end and last > start)
    return sorted(found)
