"""The most votes on a GPU: exact, ascending, ties to the lowest index, and the host never waits.

Votes are not negative, so their bits order them. A histogram of the upper bits finds the bin that the k-th vote lies
in; the few votes of that bin are listed; every program then finds the exact threshold among them, and writes the
chosen positions of its own slice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import is_known, on_host

_SLICE = 4096  # votes per program
_LOW_BITS = 20  # of 31; the others number the bins
_BINS = 2048
_LISTED = 4096  # how much of the list is held at once


@triton.jit
def _bits(votes, at, inside):
    """Votes as integers of the same order; outside, less than any."""
    bits = tl.load(votes + at, mask=inside, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside, bits, -1)


@triton.jit
def _slice(start_loc, SLICE: tl.constexpr):
    """Of this program: where its block's votes begin, their number, and its own offsets."""
    start = tl.load(start_loc + tl.program_id(0))
    count = (tl.load(start_loc + tl.program_id(0) + 1) - start).to(tl.int32)
    return start, count, tl.program_id(1) * SLICE + tl.arange(0, SLICE)


@triton.jit
def count_bins(votes, start_loc, bins, BINS: tl.constexpr, LOW_BITS: tl.constexpr, SLICE: tl.constexpr):
    """Grid [num_blocks, slices]: how many votes fall into each bin."""
    start, count, offset = _slice(start_loc, SLICE)
    if tl.program_id(1) * SLICE >= count:
        return
    inside = offset < count
    bits = _bits(votes, start + offset, inside)
    tl.atomic_add(bins + tl.program_id(0) * BINS + (bits >> LOW_BITS), 1, mask=inside, sem="relaxed")


@triton.jit
def _threshold_bin(bins, k, BINS: tl.constexpr):
    """The bin of the k-th vote, and how many of its votes are wanted."""
    b = tl.arange(0, BINS)
    votes = tl.load(bins + tl.program_id(0) * BINS + b)
    above = tl.cumsum(votes, axis=0, reverse=True)
    chosen = tl.max(tl.where(above >= k, b, -1), axis=0)
    return chosen, k - tl.sum(tl.where(b > chosen, votes, 0), axis=0)


@triton.jit
def list_bin(
    votes, start_loc, bins, listed, listed_at, num_listed, num_above, k, size,
    BINS: tl.constexpr, LOW_BITS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: list the votes of the threshold's bin in any order, count those above it."""
    start, count, offset = _slice(start_loc, SLICE)
    if tl.program_id(1) * SLICE >= count:
        return
    bits = _bits(votes, start + offset, offset < count)
    chosen, _ = _threshold_bin(bins, k, BINS)
    above = (bits >> LOW_BITS) > chosen
    here = (bits >> LOW_BITS) == chosen
    tl.store(num_above + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(above.to(tl.int32), axis=0))
    place = tl.cumsum(here.to(tl.int32), axis=0) - 1
    found = tl.sum(here.to(tl.int32), axis=0)
    if found > 0:
        place += tl.atomic_add(num_listed + tl.program_id(0), found, sem="relaxed")
        at = tl.program_id(0).to(tl.int64) * size + place
        tl.store(listed + at, bits, mask=here)
        tl.store(listed_at + at, offset, mask=here)


@triton.jit
def _how_many(values, floor, first, n, listed, LISTED: tl.constexpr):
    """Listed values >= floor; the first ones are at hand."""
    found = tl.sum((first >= floor).to(tl.int32), axis=0)
    for at in range(LISTED, n, LISTED):
        more = tl.load(values + at + listed, mask=at + listed < n, other=-1)
        found += tl.sum((more >= floor).to(tl.int32), axis=0)
    return found


@triton.jit
def _last_tie(listed, listed_at, least, ties, n, LISTED: tl.constexpr):
    """The largest index that a tie may have, so that `ties` of those at the threshold are taken."""
    low, high = 0, 0x7FFFFFFF
    lane = tl.arange(0, LISTED)
    while low < high:
        middle = low + (high - low) // 2
        found = 0
        for at in range(0, n, LISTED):
            inside = at + lane < n
            bits = tl.load(listed + at + lane, mask=inside, other=-1)
            index = tl.load(listed_at + at + lane, mask=inside, other=0x7FFFFFFF)
            found += tl.sum(((bits == least) & (index <= middle)).to(tl.int32), axis=0)
        if found >= ties:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def write_chosen(
    votes, start_loc, bins, listed, listed_at, num_listed, num_above, out, k, size,
    BINS: tl.constexpr, LOW_BITS: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: the exact threshold, found by every program, and its own slice's choice."""
    start, count, offset = _slice(start_loc, SLICE)
    if tl.program_id(1) * SLICE >= count:
        return
    block = tl.program_id(0)
    chosen, wanted = _threshold_bin(bins, k, BINS)
    n = tl.load(num_listed + block)
    listed += block.to(tl.int64) * size
    listed_at += block.to(tl.int64) * size
    lane = tl.arange(0, LISTED)
    first = tl.load(listed + lane, mask=lane < n, other=-1)
    first_at = tl.load(listed_at + lane, mask=lane < n, other=0)

    # The largest value that at least `wanted` of the list reach.
    low = tl.min(tl.where(lane < n, first, 0x7FFFFFFF), axis=0)
    high = tl.max(first, axis=0)
    for at in range(LISTED, n, LISTED):
        more = tl.load(listed + at + lane, mask=at + lane < n, other=-1)
        low = tl.minimum(low, tl.min(tl.where(at + lane < n, more, 0x7FFFFFFF), axis=0))
        high = tl.maximum(high, tl.max(more, axis=0))
    while low < high:
        middle = low + (high - low + 1) // 2
        if _how_many(listed, middle, first, n, lane, LISTED) >= wanted:
            low = middle
        else:
            high = middle - 1
    least = low
    more_than = _how_many(listed, least + 1, first, n, lane, LISTED)
    last = 0x7FFFFFFF
    if _how_many(listed, least, first, n, lane, LISTED) > wanted:
        last = _last_tie(listed, listed_at, least, wanted - more_than, n, LISTED)

    # Where this slice's choice begins: what the slices before it chose.
    s = tl.arange(0, SLICES)
    before = tl.load(num_above + block * tl.num_programs(1) + s, mask=s < tl.program_id(1), other=0)
    place = tl.sum(before, axis=0)
    edge = tl.program_id(1) * SLICE
    taken = (first > least) | ((first == least) & (first_at <= last))
    place += tl.sum((taken & (lane < n) & (first_at < edge)).to(tl.int32), axis=0)
    for at in range(LISTED, n, LISTED):
        inside = at + lane < n
        more = tl.load(listed + at + lane, mask=inside, other=-1)
        more_at = tl.load(listed_at + at + lane, mask=inside, other=0)
        taken = (more > least) | ((more == least) & (more_at <= last))
        place += tl.sum((taken & inside & (more_at < edge)).to(tl.int32), axis=0)

    bits = _bits(votes, start + offset, offset < count)
    mine = (bits > least) | ((bits == least) & (offset <= last) & (offset < count))
    place += tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(out + block.to(tl.int64) * k + place, offset.to(tl.int64), mask=mine)


def topk_tokens(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    """See `ops.reference.topk_tokens`."""
    votes, blocks, device = votes.contiguous(), start_loc.shape[0] - 1, votes.device
    longest = _longest(votes, start_loc)
    slices = max(1, triton.cdiv(longest, _SLICE))
    counts = torch.zeros((blocks, _BINS + 1), dtype=torch.int32, device=device)
    bins, num_listed = counts.view(-1)[: blocks * _BINS], counts.view(-1)[blocks * _BINS :]
    num_above = torch.empty((blocks, slices), dtype=torch.int32, device=device)
    listed, listed_at = torch.empty((2, blocks, longest), dtype=torch.int32, device=device)
    out = torch.empty((blocks, k), dtype=torch.int64, device=device)
    start_loc, grid = start_loc.to(device), (blocks, slices)
    sizes = {"BINS": _BINS, "LOW_BITS": _LOW_BITS, "SLICE": _SLICE, "num_warps": 8}
    count_bins[grid](votes, start_loc, bins, **sizes)
    list_bin[grid](votes, start_loc, bins, listed, listed_at, num_listed, num_above, k, longest, **sizes)
    write_chosen[grid](
        votes, start_loc, bins, listed, listed_at, num_listed, num_above, out, k, longest,
        **sizes, SLICES=triton.next_power_of_2(slices), LISTED=_LISTED,
    )  # fmt: skip
    return out


def _longest(votes: Tensor, start_loc: Tensor) -> int:
    """The most votes of a block; of all blocks together where only the device knows."""
    if not is_known(start_loc):
        return votes.shape[0]
    bounds = on_host(start_loc)
    return max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
