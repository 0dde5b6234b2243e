"""The int8 copy of a layer's keys that scoring reads: one row per token, by vLLM's own block numbers.

So what vLLM does with blocks (prefix caching, preemption, freeing) holds for the copy too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenselect.integrations.ragged import Stretch
from tokenselect.integrations.vllm.requests import RequestState
from tokenselect.integrations.vllm.step import Scoring
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable


@dataclass(frozen=True, slots=True)
class CopyWork:
    """What is new for the copies of all layers in one forward pass.

    Attributes:
        centers: [new centers] int64 rows of the requests whose center is found now, and
            `first`: [new centers, center_tokens] int64, the cache rows of their first tokens.
        tokens: [new tokens] int64 cache rows, `into`: those of the copy, and `requests`: the row of each one's request.
        pages: where each sequence's tokens lie in the copy.
        batch: [num_seqs] int64 rows of the batch's requests.
        num_rows: requests that there may be.
    """

    centers: Tensor
    first: list[Tensor]
    tokens: Tensor
    into: Tensor
    requests: Tensor
    pages: PageTable
    batch: Tensor
    num_rows: int


def plan_copies(
    stretches: Sequence[Stretch], states: Sequence[RequestState], pages: PageTable, num_rows: int, num_kv_heads: int
) -> CopyWork | None:
    """Tokens of contexts that select, and that no copy holds yet; None: no context of the batch selects.

    A head's tokens of a block lie side by side in the copy: as rows of tokens, block `b` is page `b * num_kv_heads`.
    """
    device = pages.pages.device
    centers, first, tokens, owners = [], [], [], []
    for sequence, (stretch, state) in enumerate(zip(stretches, states, strict=True)):
        if not _selects(stretch, state):
            continue
        if not state.has_center:
            centers.append(state.row)
            first.append(pages.slots(sequence, torch.arange(state.config.center_tokens, device=device)))
            state.has_center = True
        positions = torch.arange(state.copied, stretch.end, device=device)
        tokens.append(positions)
        owners.append((sequence, state.row, len(positions)))
        state.copied = stretch.end
    if not owners:
        return None
    counts = torch.tensor([count for *_, count in owners], dtype=torch.int64, device=device)
    sequences = torch.tensor([sequence for sequence, *_ in owners], dtype=torch.int64, device=device)
    rows = torch.tensor([row for _, row, _ in owners], dtype=torch.int64, device=device)
    new = torch.cat(tokens)
    copied = PageTable(pages.pages * num_kv_heads, pages.page_size, pages.padding)
    owner = torch.repeat_interleave(sequences, counts)
    return CopyWork(
        torch.tensor(centers, dtype=torch.int64, device=device),
        first,
        pages.slots_of(owner, new),
        copied.slots_of(owner, new),
        torch.repeat_interleave(rows, counts),
        copied,
        torch.tensor([state.row for state in states], dtype=torch.int64, device=device),
        num_rows,
    )


def _selects(stretch: Stretch, state: RequestState) -> bool:
    config = state.config
    is_long = max(stretch.known_length, stretch.end) > config.num_dense_tokens
    return config.score_dtype == "int8" and is_long and stretch.end >= config.center_tokens


class Int8Copy:
    """One layer's copy.

    Args:
        keys: [num_blocks, num_kv_heads, block_size, head_dim], the layer's cached keys, any strides.
    """

    def __init__(self, keys: Tensor) -> None:
        self.integers = torch.empty(keys.shape, dtype=torch.int8, device=keys.device)
        self.scales = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
        self.centers = torch.zeros(0, keys.shape[1], keys.shape[3], device=keys.device)
        blocks, heads, size, dim = keys.shape
        num_rows = (blocks * heads - heads + 1) * size
        self.rows = self.integers.as_strided((num_rows, heads, dim), (dim, size * dim, 1))
        self.row_scales = self.scales.as_strided((num_rows, heads), (1, size))

    def update(self, rows: Tensor, work: CopyWork, ops: Backend) -> None:
        """Copy what is new.

        Args:
            rows: [num_rows, num_kv_heads, head_dim], the layer's cached keys, one row per token.
            work: which tokens.
            ops: the backend.
        """
        if self.centers.shape[0] < work.num_rows:
            grown = self.centers.new_zeros(work.num_rows, *self.centers.shape[1:])
            grown[: self.centers.shape[0]] = self.centers
            self.centers = grown
        for row, first in zip(work.centers.tolist(), work.first, strict=True):
            self.centers[row] = rows[first].float().mean(0)
        given = rows, work.tokens, self.centers, work.requests
        ops.quantize_into(*given, self.rows, self.row_scales, work.into)

    def scoring(self, rows: Tensor, work: CopyWork) -> Scoring:
        """The copy of the keys `rows` as scoring reads it."""
        return Scoring(rows, self.rows, work.pages, self.row_scales, self.centers[work.batch])
