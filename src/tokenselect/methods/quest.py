"""Quest: pages of keys, ranked by the largest logit that the bounds of a page allow.

As in the paper, a page of 16 keys is known by the least and the largest value of each channel, and the query meets it
at its true position. Other than there, one set of pages serves all heads of a layer (each head's softmax over the
pages, summed), keys are bounded before rotation while the query is turned, and prompts are read by selection too, for
dense attention cannot read them beyond the window.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024
(arXiv 2406.10774), equation 1 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Around, Choice, turned_queries

if TYPE_CHECKING:
    from tokenselect.ops.paging import PageTable
    from tokenselect.ops.reference import Distances

PAGE_SIZE = 16


def page_bounds(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each channel in each page of keys [T, Hkv, D], each [pages, Hkv, D] float32.

    The last page may be short.
    """
    whole = keys.shape[0] // PAGE_SIZE * PAGE_SIZE
    parts = [keys[:whole].reshape(-1, PAGE_SIZE, *keys.shape[1:]).aminmax(dim=1)] if whole else []
    if whole < keys.shape[0]:
        parts.append(keys[None, whole:].aminmax(dim=1))
    low, high = zip(*parts, strict=True)
    return torch.cat(low).float(), torch.cat(high).float()


def largest_logits(queries: Tensor, low: Tensor, high: Tensor, per_run: int) -> Tensor:
    """What no key within the bounds exceeds: the sum of `max(q * low, q * high)` over channels.

    Args:
        queries: [runs, Hq, D], each for `per_run` consecutive pages.
        low: [pages, Hkv, D].
        high: like `low`.
        per_run: pages of a run; the last may have fewer.

    Returns:
        [Hq, pages].
    """
    (runs, num_q_heads, dim), (num_pages, num_kv_heads, _) = queries.shape, low.shape
    missing = (0, 0, 0, 0, 0, runs * per_run - num_pages)
    low, high = (torch.nn.functional.pad(part, missing).view(runs, per_run, num_kv_heads, dim) for part in (low, high))
    grouped = queries.view(runs, num_kv_heads, -1, dim)
    above = torch.einsum("rhgd,rphd->hgrp", grouped.clamp(min=0), high)
    below = torch.einsum("rhgd,rphd->hgrp", grouped.clamp(max=0), low)
    return (above + below).reshape(num_q_heads, -1)[:, :num_pages]


class PageVotes(Around):
    """Every token gets the vote of its page; pages are counted from the first candidate."""

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
        view = distances[0]
        known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        votes = []
        for i, (sequence, (first, end)) in enumerate(zip(sequences.tolist(), candidates.tolist(), strict=True)):
            whole = first + (end - first) // PAGE_SIZE * PAGE_SIZE
            if (sequence, first) not in known:
                longest = int(candidates[(sequences == sequence) & (candidates[:, 0] == first), 1].max())
                known[sequence, first] = page_bounds(pages.rows(keys, sequence, first, longest))
            count = (whole - first) // PAGE_SIZE
            low, high = (part[:count] for part in known[sequence, first])
            if whole < end:
                rest_low, rest_high = page_bounds(pages.rows(keys, sequence, whole, end))
                low, high = torch.cat((low, rest_low)), torch.cat((high, rest_high))
            turned = turned_queries(queries[i], view, i)
            per_run = view.run_size // PAGE_SIZE if len(turned) > 1 else len(low)
            own = (largest_logits(turned, low, high, per_run) * scale).softmax(-1).sum(0)
            votes.append(own.repeat_interleave(PAGE_SIZE)[: end - first])
        return torch.cat(votes), torch.nn.functional.pad(candidates.diff()[:, 0].cumsum(0), (1, 0))


def _settings(config: TokenSelectConfig) -> TokenSelectConfig:
    return config.replace(
        num_dense_tokens=0,
        scoring="distance",
        vote_horizon=0,
        score_dtype="same",
        distance_bucket_size=4 * PAGE_SIZE,
        head_weights=False,
        reuse_threshold=2.0,
    )


QUEST = Choice(_settings, PageVotes)
