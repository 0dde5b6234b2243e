"""TokenSelect as its published code computes it, with the defects of that code: to compare with, never to follow.

Query head `h` is scored against key head `h % Hkv` where the models mean `h // group`; logits, softmax and their sum
are in bfloat16, the logits without `D ** -0.5`; the Selection Cache is switched off (method.md, section 4).

Source: the code of Wu et al., "TokenSelect", EMNLP 2025 (arXiv 2411.02886).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.paper import paper_settings
from tokenselect.methods.selecting import Around, Choice, turned_queries

if TYPE_CHECKING:
    from tokenselect.ops.paging import PageTable
    from tokenselect.ops.reference import Distances


def modulo_order(num_q_heads: int, num_kv_heads: int) -> list[int]:
    """Query heads in such an order that contiguous groups are those with equal `h % num_kv_heads`."""
    return [head for kv in range(num_kv_heads) for head in range(kv, num_q_heads, num_kv_heads)]


class PublishedVotes(Around):
    """The vote of the published code."""

    def score_tokens(
        self,
        queries: Tensor,
        keys: Tensor,
        pages: PageTable,
        sequences: Tensor,
        candidates: Tensor,
        distances: Sequence[Distances],
        scale: float,
        *rest: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As `ops.reference.score_tokens`, for one view of the distances."""
        num_kv_heads = keys.shape[1]
        order = modulo_order(queries.shape[1], num_kv_heads)
        votes = []
        for i, (sequence, (first, end)) in enumerate(zip(sequences.tolist(), candidates.tolist(), strict=True)):
            q = turned_queries(queries[i], distances[0], i)[0, order].bfloat16()
            k = pages.rows(keys, sequence, first, end).bfloat16()
            logits = q.view(num_kv_heads, -1, q.shape[-1]) @ k.permute(1, 2, 0) * scale  # [Hkv, group, T]
            votes.append(logits.softmax(-1).flatten(0, 1).sum(0).float())
        return torch.cat(votes), torch.nn.functional.pad(candidates.diff()[:, 0].cumsum(0), (1, 0))


def _settings(config: TokenSelectConfig) -> TokenSelectConfig:
    return paper_settings(config).replace(reuse_threshold=2.0)


PUBLISHED = Choice(_settings, PublishedVotes)
