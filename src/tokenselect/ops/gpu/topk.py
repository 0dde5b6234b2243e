"""The most votes on a GPU: exact, ascending, ties to the lowest index, and the host never waits.

Votes are not negative, so their bits order them. At least k votes reach the k-th largest maximum of any chunks of them,
and few do but those that win. These are listed; then every program finds the exact threshold among them and writes the
chosen positions of its own slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.ops.gpu.bounds import is_known, on_host, overlap
from tokenselect.ops.gpu.device_code import after_predecessor, is_served

_LEAST_SLICE, _MOST_SLICE, _SLICES = 4096, 8192, 128  # votes per program, and programs wanted
_AT_HAND = 4096  # how much of a list a program holds
_CHUNKS_PER_CHOICE, _LEAST_CHUNKS = 4, 4096  # at most, and where few are chosen


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
def find_maxima(
    votes, start_loc, served, maxima, num_listed, num_chunks, SLICE: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: the maximum of every chunk; -1 for chunks of no votes."""
    after_predecessor(OVERLAP)
    if is_served(served, tl.program_id(0)):
        return
    start, count = _block(start_loc)
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    if tl.program_id(1) == 0:
        tl.store(num_listed + block, 0)
    chunk = tl.arange(0, SLICE // CHUNK)
    offset = edge + chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    most = tl.max(_bits(votes, start + offset, offset < count), axis=1)
    place = edge // CHUNK + chunk
    tl.store(maxima + block.to(tl.int64) * num_chunks + place, most, mask=place < num_chunks)


@triton.jit
def _how_many(values, floor, first, n, lane, AT_HAND: tl.constexpr):
    """Values >= floor; the first ones are at hand."""
    found = tl.sum((first >= floor).to(tl.int32), axis=0)
    for at in range(AT_HAND, n, AT_HAND):
        more = tl.load(values + at + lane, mask=at + lane < n, other=-1)
        found += tl.sum((more >= floor).to(tl.int32), axis=0)
    return found


@triton.jit
def _between(values, first, n, k, most, lane, AT_HAND: tl.constexpr):
    """The largest value found that k to `most` values reach, how many do, and how many reach the next one tried.

    More than `most` reach it where ties leave no choice; then it is the k-th largest.
    """
    low = tl.min(tl.where(lane < n, tl.maximum(first, 0), 0x7FFFFFFF), axis=0)
    high = tl.max(first, axis=0)
    at_low = tl.sum(((first >= 0) & (lane < n)).to(tl.int32), axis=0)
    for at in range(AT_HAND, n, AT_HAND):
        more = tl.load(values + at + lane, mask=at + lane < n, other=-1)
        low = tl.minimum(low, tl.min(tl.where(at + lane < n, tl.maximum(more, 0), 0x7FFFFFFF), axis=0))
        high = tl.maximum(high, tl.max(more, axis=0))
        at_low += tl.sum((more >= 0).to(tl.int32), axis=0)
    high += 1
    at_high, step = 0, 0
    while (high - low > 1) & (at_low > most):
        middle = low + (high - low) // 2
        if step % 2 == 0:  # guess by the counts, halve every other time
            share = (at_low - k).to(tl.float32) / (at_low - at_high).to(tl.float32)
            guess = low + (share * (high - low).to(tl.float32)).to(tl.int32)
            middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        found = _how_many(values, middle, first, n, lane, AT_HAND)
        if found >= k:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
        step += 1
    return low, at_low, at_high


@triton.jit
def list_votes(
    votes, start_loc, served, maxima, listed, listed_at, num_listed, num_chunks, k, size,
    SLICE: tl.constexpr, AT_HAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: list, in any order, the votes that reach about the k-th largest maximum."""
    after_predecessor(OVERLAP)
    if is_served(served, tl.program_id(0)):
        return
    start, count = _block(start_loc)
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    if edge >= count:
        return
    maxima += block.to(tl.int64) * num_chunks
    lane = tl.arange(0, AT_HAND)
    first = tl.load(maxima + lane, mask=lane < num_chunks, other=-1)
    offset = edge + tl.arange(0, SLICE)
    bits = _bits(votes, start + offset, offset < count)
    floor, reached, _ = _between(maxima, first, num_chunks, k, k + k // 4, lane, AT_HAND)
    if reached < k:  # a short block has fewer chunks than it chooses votes
        floor = 0
    here = bits >= floor
    found = tl.sum(here.to(tl.int32), axis=0)
    if found > 0:
        place = tl.cumsum(here.to(tl.int32), axis=0) - 1
        place += tl.atomic_add(num_listed + block, found, sem="relaxed")
        at = block.to(tl.int64) * size + place
        tl.store(listed + at, bits, mask=here)
        tl.store(listed_at + at, offset, mask=here)


@triton.jit
def _last_tie(listed, listed_at, least, ties, n, lane, AT_HAND: tl.constexpr):
    """The largest index that a tie may have, so that `ties` of those at the threshold are taken."""
    low, high = 0, 0x7FFFFFFF
    while low < high:
        middle = low + (high - low) // 2
        found = 0
        for at in range(0, n, AT_HAND):
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
    votes, start_loc, served, listed, listed_at, num_listed, out, firsts, k, size, out_stride,
    SLICE: tl.constexpr, AT_HAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: the exact threshold, found by every program, and its own slice's choice."""
    after_predecessor(OVERLAP)
    if is_served(served, tl.program_id(0)):
        return
    start, count = _block(start_loc)
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    if edge >= count:
        return
    n = tl.load(num_listed + block)
    listed += block.to(tl.int64) * size
    listed_at += block.to(tl.int64) * size
    lane = tl.arange(0, AT_HAND)
    first = tl.load(listed + lane, mask=lane < n, other=-1)
    first_at = tl.load(listed_at + lane, mask=lane < n, other=0x7FFFFFFF)
    offset = edge + tl.arange(0, SLICE)
    bits = _bits(votes, start + offset, offset < count)
    least, reached, above = _between(listed, first, n, k, k, lane, AT_HAND)
    last = 0x7FFFFFFF
    if reached > k:
        last = _last_tie(listed, listed_at, least, k - above, n, lane, AT_HAND)

    # This slice's choice begins after what the slices before it chose.
    taken = (first > least) | ((first == least) & (first_at <= last))
    before = tl.sum((taken & (first_at < edge)).to(tl.int32), axis=0)
    for at in range(AT_HAND, n, AT_HAND):
        more = tl.load(listed + at + lane, mask=at + lane < n, other=-1)
        more_at = tl.load(listed_at + at + lane, mask=at + lane < n, other=0x7FFFFFFF)
        taken = (more > least) | ((more == least) & (more_at <= last))
        before += tl.sum((taken & (more_at < edge)).to(tl.int32), axis=0)
    mine = (bits > least) | ((bits == least) & (offset <= last))
    place = before + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    found = offset.to(tl.int64)
    if firsts is not None:
        found += tl.load(firsts + block)
    tl.store(out + block.to(tl.int64) * out_stride + place, found, mask=mine)


@dataclass(frozen=True, slots=True)
class Maxima:
    """Of chunks of the votes, for `topk_tokens`.

    Attributes:
        values: [num_blocks * chunks] int32, bits of the largest vote of each; -1: there is none.
        num_listed: [num_blocks] int32, 0.
        chunk: votes in each, a power of 2.
        chunks: of a block.
    """

    values: Tensor
    num_listed: Tensor
    chunk: int
    chunks: int

    @classmethod
    def of(cls, blocks: int, longest: int, k: int, device: torch.device) -> Maxima:
        """Room for them, not written to."""
        chunk = min(_slice(longest), _per_chunk(longest, k))
        chunks = triton.cdiv(longest, chunk)
        room = torch.empty(blocks * (chunks + 1), dtype=torch.int32, device=device)
        return cls(room[: blocks * chunks], room[blocks * chunks :], chunk, chunks)


def topk_tokens(
    votes: Tensor,
    start_loc: Tensor,
    k: int,
    longest: int | None = None,
    into: Tensor | None = None,
    firsts: Tensor | None = None,
    served: Tensor | None = None,
    maxima: Maxima | None = None,
) -> Tensor:
    """See `ops.reference.topk_tokens`.

    Args:
        votes: those of all blocks.
        start_loc: where each block's begin.
        k: how many are chosen.
        longest: the most votes that a block may have, where that is known.
        into: [num_blocks, k] int64, any stride between rows, that is written to and returned.
        firsts: [num_blocks] int64, added to what is found in each block.
        served: [num_blocks] int64, not 0 for blocks that are left as they are.
        maxima: of the votes, where they are there already.
    """
    votes, blocks, device = votes.contiguous(), start_loc.shape[0] - 1, votes.device
    longest = _longest(votes, start_loc) if longest is None else longest
    size = _slice(longest)
    listed, listed_at = torch.empty((2, blocks, longest), dtype=torch.int32, device=device)
    out = torch.empty((blocks, k), dtype=torch.int64, device=device) if into is None else into
    start_loc, grid = start_loc.to(device), (blocks, triton.cdiv(longest, size))
    if maxima is None:
        maxima = Maxima.of(blocks, longest, k, device)
        find_maxima[grid](
            votes, start_loc, served, maxima.values, maxima.num_listed, maxima.chunks,
            SLICE=size, CHUNK=maxima.chunk, num_warps=8, **overlap(device),
        )  # fmt: skip
    chunks, num_listed = maxima.chunks, maxima.num_listed
    list_votes[grid](
        votes, start_loc, served, maxima.values, listed, listed_at, num_listed, chunks, k, longest,
        SLICE=size, AT_HAND=min(2 * _AT_HAND, triton.next_power_of_2(chunks)), num_warps=16, **overlap(device),
    )  # fmt: skip
    write_chosen[grid](
        votes, start_loc, served, listed, listed_at, num_listed, out, firsts, k, longest, out.stride(0),
        SLICE=size, AT_HAND=_AT_HAND, num_warps=8, **overlap(device),
    )  # fmt: skip
    return out


def _slice(longest: int) -> int:
    """Votes per program."""
    return _LEAST_SLICE if longest <= _LEAST_SLICE * _SLICES else _MOST_SLICE


def _longest(votes: Tensor, start_loc: Tensor) -> int:
    """The most votes of a block; of all blocks together where only the device knows."""
    if not is_known(start_loc):
        return votes.shape[0]
    bounds = on_host(start_loc)
    return max(b - a for a, b in pairwise(bounds))


def _per_chunk(longest: int, k: int) -> int:
    """Votes per chunk, a power of 2: more chunks than are chosen, no more than a program holds."""
    return 1 << (-(-longest // max(_CHUNKS_PER_CHOICE * k, _LEAST_CHUNKS)) - 1).bit_length()
