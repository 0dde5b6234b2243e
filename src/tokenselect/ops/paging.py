"""Where tokens lie: positions of a sequence to rows of a paged cache, in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int, int]


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
        padded = positions + self.padding[sequence] if self.padding[sequence] else positions
        if self.pages.shape[1] == 1:
            return padded + self.pages[sequence, 0] * self.page_size
        return self.pages[sequence][padded // self.page_size] * self.page_size + padded % self.page_size

    def slots_of(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Rows of the cache that hold `positions`, each of its own sequence (int64, broadcastable to one shape)."""
        padded = positions
        if any(self.padding):
            padded = padded + torch.as_tensor(self.padding, device=positions.device)[sequences]
        return self.pages[sequences, padded // self.page_size] * self.page_size + padded % self.page_size

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


@functools.lru_cache(maxsize=16)
def first_pages(batch: int, apart: int, device: torch.device) -> Tensor:
    """The page [B, 1] of each sequence of a cache whose pages lie `apart`. All layers share it: never write to it."""
    with torch.inference_mode(False):  # it outlives the pass that asks first
        return torch.arange(batch, device=device)[:, None] * apart


def range_slots(ranges: Sequence[Range], pages: PageTable) -> Tensor:
    """Rows of the cache that hold ranges of positions, one after the other.

    Args:
        ranges: sequence, first position, and one past the last one; of the sequence -1: zeros, room for `fill_slots`.
        pages: where each sequence's tokens lie.

    Returns:
        [sum of the ranges' lengths] int64.
    """
    device = pages.pages.device
    total = sum(end - start for _, start, end in ranges)
    sequences, starts, ends = torch.tensor(ranges, dtype=torch.int64).view(-1, 3).to(device).unbind(1)
    lengths = ends - starts
    owner = torch.repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=device) + (ends - lengths.cumsum(0))[owner]
    is_hole = sequences[owner] < 0
    return pages.slots_of(sequences.clamp(min=0)[owner], positions.masked_fill(is_hole, 0)).masked_fill(is_hole, 0)


def fill_slots(chosen: Tensor, sequences: Tensor, pages: PageTable, places: Tensor, slots: Tensor) -> None:
    """Write where chosen tokens lie in the cache into a list of attended rows.

    Args:
        chosen: [num_blocks, k] int64 positions.
        sequences: [num_blocks] int64.
        pages: where each sequence's tokens lie.
        places: [num_blocks] int64, where in `slots` a block's chosen tokens begin.
        slots: [sum of attended] int64, written to.
    """
    at = places[:, None] + torch.arange(chosen.shape[1], device=chosen.device)
    slots[at] = pages.slots_of(sequences[:, None], chosen)


def write_rows(keys: Tensor, values: Tensor, slots: Tensor, key_rows: Tensor, value_rows: Tensor) -> None:
    """Write keys and values of new tokens into their rows of a cache.

    Args:
        keys: [at least num_tokens, num_kv_heads, head_dim], raw, any strides between rows.
        values: like `keys`.
        slots: [num_tokens] int64, rows of the cache, each once; -1: written nowhere.
        key_rows: [num_rows, num_kv_heads, head_dim] in the dtype of `keys`, any strides between rows and heads.
        value_rows: like `key_rows`.
    """
    real = slots >= 0
    for rows, into in ((keys, key_rows), (values, value_rows)):
        into[slots[real]] = rows[: len(slots)][real]
