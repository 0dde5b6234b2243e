"""The most votes on a GPU: exact, ascending, ties to the lowest index, and the host never waits.

Votes are not negative, so their bits order them. At least k votes reach the k-th largest maximum of any chunks of them:
a histogram of the chunks' maxima gives a floor that few votes reach but those that win. These are listed; every program
then finds the exact threshold among them, and writes the chosen positions of its own slice.
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
_CHUNKS_PER_CHOICE, _MOST_PER_CHUNK = 4, 64


@triton.jit
def _bits(votes, at, inside):
    """Votes as integers of the same order; outside, less than any."""
    bits = tl.load(votes + at, mask=inside, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside, bits, -1)


@triton.jit
def _block(start_loc):
    """Where the votes of this program's block begin, and their number."""
    start = tl.load(start_loc + tl.program_id(0))
    return start, (tl.load(start_loc + tl.program_id(0) + 1) - start).to(tl.int32)


@triton.jit
def count_maxima(
    votes, start_loc, bins, BINS: tl.constexpr, LOW_BITS: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr
):
    """Grid [num_blocks, slices]: how many chunks have their maximum in each bin."""
    start, count = _block(start_loc)
    edge = tl.program_id(1) * SLICE
    if edge >= count:
        return
    chunk = edge + tl.arange(0, SLICE // CHUNK) * CHUNK
    offset = chunk[:, None] + tl.arange(0, CHUNK)[None, :]
    most = tl.max(_bits(votes, start + offset, offset < count), axis=1)
    tl.atomic_add(bins + tl.program_id(0) * BINS + (most >> LOW_BITS), 1, mask=chunk < count, sem="relaxed")


@triton.jit
def list_votes(
    votes, start_loc, bins, listed, listed_at, num_listed, k, size,
    BINS: tl.constexpr, LOW_BITS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: list, in any order, the votes that reach the bin of the k-th maximum."""
    start, count = _block(start_loc)
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    if edge >= count:
        return
    offset = edge + tl.arange(0, SLICE)
    bits = _bits(votes, start + offset, offset < count)
    b = tl.arange(0, BINS)
    reached = tl.cumsum(tl.load(bins + block * BINS + b), axis=0, reverse=True)
    floor = tl.max(tl.where(reached >= k, b, 0), axis=0) << LOW_BITS
    here = bits >= floor
    found = tl.sum(here.to(tl.int32), axis=0)
    if found > 0:
        place = tl.cumsum(here.to(tl.int32), axis=0) - 1
        place += tl.atomic_add(num_listed + block, found, sem="relaxed")
        at = block.to(tl.int64) * size + place
        tl.store(listed + at, bits, mask=here)
        tl.store(listed_at + at, offset, mask=here)


@triton.jit
def _how_many(listed, floor, first, n, lane, LISTED: tl.constexpr):
    """Listed votes >= floor; the first ones are at hand."""
    found = tl.sum((first >= floor).to(tl.int32), axis=0)
    for at in range(LISTED, n, LISTED):
        more = tl.load(listed + at + lane, mask=at + lane < n, other=-1)
        found += tl.sum((more >= floor).to(tl.int32), axis=0)
    return found


@triton.jit
def _last_tie(listed, listed_at, least, ties, n, lane, LISTED: tl.constexpr):
    """The largest index that a tie may have, so that `ties` of those at the threshold are taken."""
    low, high = 0, 0x7FFFFFFF
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
def _threshold(listed, listed_at, first, n, k, lane, LISTED: tl.constexpr):
    """A vote and an index: those above the vote are chosen, and those equal to it up to the index."""
    low = tl.min(tl.where(lane < n, first, 0x7FFFFFFF), axis=0)
    high = tl.max(first, axis=0)
    for at in range(LISTED, n, LISTED):
        more = tl.load(listed + at + lane, mask=at + lane < n, other=-1)
        low = tl.minimum(low, tl.min(tl.where(at + lane < n, more, 0x7FFFFFFF), axis=0))
        high = tl.maximum(high, tl.max(more, axis=0))
    high += 1
    at_low, at_high, step = n, 0, 0  # at least k reach `low`, fewer reach `high`
    while (high - low > 1) & (at_low != k):
        middle = low + (high - low) // 2
        if step % 2 == 0:  # guess by the counts, halve every other time
            share = (at_low - k).to(tl.float32) / (at_low - at_high).to(tl.float32)
            guess = low + (share * (high - low).to(tl.float32)).to(tl.int32)
            middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        found = _how_many(listed, middle, first, n, lane, LISTED)
        if found >= k:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
        step += 1
    last = 0x7FFFFFFF
    if at_low > k:
        last = _last_tie(listed, listed_at, low, k - at_high, n, lane, LISTED)
    return low, last


@triton.jit
def write_chosen(
    votes, start_loc, listed, listed_at, num_listed, out, k, size, SLICE: tl.constexpr, LISTED: tl.constexpr
):
    """Grid [num_blocks, slices]: the exact threshold, found by every program, and its own slice's choice."""
    start, count = _block(start_loc)
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    if edge >= count:
        return
    n = tl.load(num_listed + block)
    listed += block.to(tl.int64) * size
    listed_at += block.to(tl.int64) * size
    lane = tl.arange(0, LISTED)
    first = tl.load(listed + lane, mask=lane < n, other=-1)
    first_at = tl.load(listed_at + lane, mask=lane < n, other=0x7FFFFFFF)
    offset = edge + tl.arange(0, SLICE)
    bits = _bits(votes, start + offset, offset < count)
    least, last = _threshold(listed, listed_at, first, n, k, lane, LISTED)

    # This slice's choice begins after what the slices before it chose.
    taken = (first > least) | ((first == least) & (first_at <= last))
    before = tl.sum((taken & (first_at < edge)).to(tl.int32), axis=0)
    for at in range(LISTED, n, LISTED):
        more = tl.load(listed + at + lane, mask=at + lane < n, other=-1)
        more_at = tl.load(listed_at + at + lane, mask=at + lane < n, other=0x7FFFFFFF)
        taken = (more > least) | ((more == least) & (more_at <= last))
        before += tl.sum((taken & (more_at < edge)).to(tl.int32), axis=0)
    mine = (bits > least) | ((bits == least) & (offset <= last))
    place = before + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(out + block.to(tl.int64) * k + place, offset.to(tl.int64), mask=mine)


def topk_tokens(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    """See `ops.reference.topk_tokens`."""
    votes, blocks, device = votes.contiguous(), start_loc.shape[0] - 1, votes.device
    longest = _longest(votes, start_loc)
    counts = torch.zeros(blocks * (_BINS + 1), dtype=torch.int32, device=device)
    bins, num_listed = counts[: blocks * _BINS], counts[blocks * _BINS :]
    listed, listed_at = torch.empty((2, blocks, longest), dtype=torch.int32, device=device)
    out = torch.empty((blocks, k), dtype=torch.int64, device=device)
    start_loc, grid = start_loc.to(device), (blocks, max(1, triton.cdiv(longest, _SLICE)))
    sizes = {"BINS": _BINS, "LOW_BITS": _LOW_BITS, "SLICE": _SLICE}
    count_maxima[grid](votes, start_loc, bins, **sizes, CHUNK=_per_chunk(longest, k), num_warps=8)
    list_votes[grid](votes, start_loc, bins, listed, listed_at, num_listed, k, longest, **sizes, num_warps=8)
    write_chosen[grid](
        votes, start_loc, listed, listed_at, num_listed, out, k, longest, SLICE=_SLICE, LISTED=_LISTED, num_warps=8
    )
    return out


def _longest(votes: Tensor, start_loc: Tensor) -> int:
    """The most votes of a block; of all blocks together where only the device knows."""
    if not is_known(start_loc):
        return votes.shape[0]
    bounds = on_host(start_loc)
    return max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))


def _per_chunk(longest: int, k: int) -> int:
    """Votes per chunk, a power of 2: many more chunks than are chosen."""
    most = longest // (_CHUNKS_PER_CHOICE * k)
    return 1 << max(0, min(most, _MOST_PER_CHUNK).bit_length() - 1)
