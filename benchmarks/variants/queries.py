"""Scoring with changed queries: other key heads, or low frequencies alone. Every backend computes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenselect.methods.published import modulo_order
from tokenselect.methods.selecting import Around


class ModuloHeads(Around):
    """Query head `h` votes by key head `h % Hkv`, as in the published code."""

    def score_tokens(self, queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """As `ops.reference.score_tokens`."""
        order = modulo_order(queries.shape[1], keys.shape[1])
        votes: tuple[Tensor, Tensor] = self.ops.score_tokens(queries[:, order].contiguous(), keys, *rest)
        return votes


class LowFrequencies(Around):
    """The slower half of the rotated dimensions alone votes (half layout): half of the key bytes would do."""

    def score_tokens(self, queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """As `ops.reference.score_tokens`."""
        quarter = queries.shape[-1] // 4
        slow = queries.float().clone()
        slow[..., :quarter] = slow[..., 2 * quarter : 3 * quarter] = 0
        votes: tuple[Tensor, Tensor] = self.ops.score_tokens(slow, keys, *rest)
        return votes
