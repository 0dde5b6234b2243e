"""Where tokens lie: positions of a sequence to rows of a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PageTable:
    """Pages of each sequence. A contiguous cache is the case of one page a sequence.

    Attributes:
        pages: [num_seqs, max_pages] int64; page `j` of a sequence holds its positions
            `j * page_size .. (j + 1) * page_size - 1` in the rows `pages[j] * page_size + ...`.
        page_size: tokens per page, at least 1.
        padding: [num_seqs], rows at the start of the first page that hold no token (left-padded batches).
    """

    pages: Tensor
    page_size: int
    padding: Sequence[int]

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        """Rows of the cache that hold `positions` (int64, any shape) of a sequence."""
        padded = positions + self.padding[sequence]
        if self.pages.shape[1] == 1:
            return padded + self.pages[sequence, 0] * self.page_size
        return self.pages[sequence][padded // self.page_size] * self.page_size + padded % self.page_size

    def rows(self, cache: Tensor, sequence: int, start: int, end: int) -> Tensor:
        """The rows of positions `start .. end - 1`: a view where they lie in one page, else a copy.

        Args:
            cache: [num_rows, num_kv_heads, head_dim], any strides.

        Returns:
            [end - start, num_kv_heads, head_dim].
        """
        begin, stop = start + self.padding[sequence], end + self.padding[sequence]
        if end > start and begin // self.page_size == (stop - 1) // self.page_size:
            page = int(self.pages[sequence, begin // self.page_size])
            first = page * self.page_size + begin % self.page_size
            return cache[first : first + end - start]
        return cache[self.slots(sequence, torch.arange(start, end, device=cache.device))]
