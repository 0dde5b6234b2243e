"""The most votes on a GPU: exact, ascending, ties to the lowest index, and the host never waits.

Votes are not negative, so their bits order them. At least k votes reach the k-th largest maximum of any parts of them.
A part, called a chunk, is every n-th vote here: so large ones that lie side by side are in different chunks, and few
votes reach that maximum but those that win. These are listed; then every program finds the exact threshold among them
and writes the chosen positions of its own slice.
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

_LEAST_SLICE, _MOST_SLICE, _SLICES = 1024, 8192, 128  # votes per program, and programs wanted
_AT_HAND = 4096  # how much of a list a program holds
_CHUNKS_PER_CHOICE, _LEAST_CHUNKS = 2, 4096  # at least
_CHUNKS_EACH, _MOST_ROWS = 32, 64  # of a program that finds maxima, and votes of each that it has at hand
_WARPS = 8


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
    votes, start_loc, served, maxima, num_listed, num_chunks, EACH: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, shares of EACH chunks]: the maximum of every chunk; -1 for chunks of no votes."""
    after_predecessor(OVERLAP)
    if is_served(served, tl.program_id(0)):
        return
    start, count = _block(start_loc)
    if tl.program_id(1) == 0:
        tl.store(num_listed + tl.program_id(0), 0)
    chunk = tl.program_id(1) * EACH + tl.arange(0, EACH)
    most = tl.full([EACH], -1, tl.int32)
    for row in range(0, tl.cdiv(count, num_chunks), ROWS):
        offset = (row + tl.arange(0, ROWS))[:, None] * num_chunks + chunk[None, :]
        most = tl.maximum(most, tl.max(_bits(votes, start + offset, offset < count), axis=0))
    tl.store(maxima + tl.program_id(0) * num_chunks + chunk, most)


@triton.jit
def _reach(values, a, b):
    """How many values, fewer than 2 ** 15, reach each of two floors."""
    both = tl.sum((values >= a).to(tl.int32) + (values >= b).to(tl.int32) * 65536, axis=0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _narrowed(low, at_low, high, at_high, floor, found, k):
    """The bounds, once it is known how many values reach another floor."""
    is_low, is_high = (found >= k) & (floor > low), (found < k) & (floor < high)
    low, at_low = tl.where(is_low, floor, low), tl.where(is_low, found, at_low)
    return low, at_low, tl.where(is_high, floor, high), tl.where(is_high, found, at_high)


@triton.jit
def _range(values, first, n, lane, AT_HAND: tl.constexpr):
    """The smallest of n values, and one more than the largest; the first ones are at hand."""
    low = tl.min(tl.where(lane < n, first, 0x7FFFFFFF), axis=0)
    high = tl.max(first, axis=0)
    for at in range(AT_HAND, n, AT_HAND):
        more = tl.load(values + at + lane, mask=at + lane < n, other=-1)
        low = tl.minimum(low, tl.min(tl.where(at + lane < n, more, 0x7FFFFFFF), axis=0))
        high = tl.maximum(high, tl.max(more, axis=0))
    return low, high + 1


@triton.jit
def _between(values, first, n, k, most, low, high, lane, AT_HAND: tl.constexpr):
    """The largest value found that k to `most` of n values reach, how many do, and how many reach the next one tried.

    All reach `low` and none `high`. More than `most` reach what is found where ties leave no choice, which then is the
    k-th largest; fewer than k where there are no more.
    """
    at_low = n
    at_high, step = 0, 0
    while (high - low > 1) & (at_low > most):
        # Two floors around a guess by the counts; every third time the middle, as guesses may be bad.
        width = high - low
        share = (at_low - k).to(tl.float32) / (at_low - at_high).to(tl.float32)
        guess, margin = low + (share * width.to(tl.float32)).to(tl.int32), tl.maximum(width // 16, 1)
        a = tl.maximum(tl.minimum(guess - margin, high - 1), low + 1)
        b = tl.minimum(guess + margin, high - 1)
        if step % 3 == 2:
            b = low + width // 2
        at_a, at_b = _reach(first, a, b)
        for at in range(AT_HAND, n, AT_HAND):
            more = tl.load(values + at + lane, mask=at + lane < n, other=-1)
            more_a, more_b = _reach(more, a, b)
            at_a, at_b = at_a + more_a, at_b + more_b
        low, at_low, high, at_high = _narrowed(low, at_low, high, at_high, a, at_a, k)
        low, at_low, high, at_high = _narrowed(low, at_low, high, at_high, b, at_b, k)
        step += 1
    return low, at_low, at_high


@triton.jit
def list_votes(
    votes, start_loc, served, maxima, listed, listed_at, num_listed, bounds, num_chunks, k, size,
    SLICE: tl.constexpr, AT_HAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: list, in any order, the votes that reach about the k-th largest maximum."""
    start, count = _block(start_loc)
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    if is_served(served, block):
        return
    after_predecessor(OVERLAP)  # which read that too
    if edge >= count:
        return
    maxima += block * num_chunks
    lane = tl.arange(0, AT_HAND)
    chunks = tl.minimum(count, num_chunks)  # the first ones, which have votes
    first = tl.load(maxima + lane, mask=lane < chunks, other=-1)
    offset = edge + tl.arange(0, SLICE)
    bits = _bits(votes, start + offset, offset < count)
    low, high = _range(maxima, first, chunks, lane, AT_HAND)
    floor, reached, _ = _between(maxima, first, chunks, k, k + k // 8, low, high, lane, AT_HAND)
    if reached < k:  # a short block has fewer chunks than it chooses votes
        floor = 0
    if edge == 0:
        tl.store(bounds + 2 * block, floor)
        tl.store(bounds + 2 * block + 1, high)
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
    votes, start_loc, served, listed, listed_at, num_listed, bounds, out, firsts, k, size, out_stride,
    SLICE: tl.constexpr, AT_HAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid [num_blocks, slices]: the exact threshold, found by every program, and its own slice's choice."""
    block, edge = tl.program_id(0), tl.program_id(1) * SLICE
    start, count = _block(start_loc)
    if is_served(served, block):
        return
    if edge >= count:
        after_predecessor(OVERLAP)
        return
    offset = edge + tl.arange(0, SLICE)
    bits = _bits(votes, start + offset, offset < count)
    begin = start * 0 if firsts is None else tl.load(firsts + block)
    after_predecessor(OVERLAP)  # `list_votes`, which read all that before
    n = tl.load(num_listed + block)
    low, high = tl.load(bounds + 2 * block), tl.load(bounds + 2 * block + 1)
    listed += block.to(tl.int64) * size
    listed_at += block.to(tl.int64) * size
    lane = tl.arange(0, AT_HAND)
    first = tl.load(listed + lane, mask=lane < n, other=-1)
    first_at = tl.load(listed_at + lane, mask=lane < n, other=0x7FFFFFFF)
    least, reached, above = _between(listed, first, n, k, k, low, high, lane, AT_HAND)
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
    tl.store(out + block.to(tl.int64) * out_stride + place, begin + offset, mask=mine)


@dataclass(frozen=True, slots=True)
class Maxima:
    """Of chunks of the votes, for `topk_tokens`.

    Attributes:
        values: [num_blocks * chunks] int32, bits of the largest vote of each; -1: there is none.
        num_listed: [num_blocks] int32, 0.
        chunks: of a block, n, a power of 2; the i-th has the votes i, i + n, i + 2 n and so on.
    """

    values: Tensor
    num_listed: Tensor
    chunks: int

    @classmethod
    def of(cls, blocks: int, k: int, device: torch.device) -> Maxima:
        """Room for them, not written to."""
        chunks = triton.next_power_of_2(max(_CHUNKS_PER_CHOICE * k, _LEAST_CHUNKS))
        room = torch.empty(blocks * (chunks + 1), dtype=torch.int32, device=device)
        return cls(room[: blocks * chunks], room[blocks * chunks :], chunks)


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
    bounds = torch.empty(2 * blocks, dtype=torch.int32, device=device)  # of what is listed
    out = torch.empty((blocks, k), dtype=torch.int64, device=device) if into is None else into
    start_loc, grid = start_loc.to(device), (blocks, triton.cdiv(longest, size))
    if maxima is None:
        maxima = Maxima.of(blocks, k, device)
        rows = triton.next_power_of_2(triton.cdiv(longest, maxima.chunks))
        find_maxima[blocks, maxima.chunks // _CHUNKS_EACH](
            votes, start_loc, served, maxima.values, maxima.num_listed, maxima.chunks,
            EACH=_CHUNKS_EACH, ROWS=min(_MOST_ROWS, rows), num_warps=_WARPS, **overlap(device),
        )  # fmt: skip
    chunks, num_listed = maxima.chunks, maxima.num_listed
    list_votes[grid](
        votes, start_loc, served, maxima.values, listed, listed_at, num_listed, bounds, chunks, k, longest,
        SLICE=size, AT_HAND=_AT_HAND, num_warps=_WARPS, **overlap(device),
    )  # fmt: skip
    write_chosen[grid](
        votes, start_loc, served, listed, listed_at, num_listed, bounds, out, firsts, k, longest, out.stride(0),
        SLICE=size, AT_HAND=_AT_HAND, num_warps=_WARPS, **overlap(device),
    )  # fmt: skip
    return out


def _slice(longest: int) -> int:
    """Votes per program."""
    per_program: int = triton.next_power_of_2(triton.cdiv(longest, _SLICES))
    return min(_MOST_SLICE, max(_LEAST_SLICE, per_program))


def _longest(votes: Tensor, start_loc: Tensor) -> int:
    """The most votes of a block; of all blocks together where only the device knows."""
    if not is_known(start_loc):
        return votes.shape[0]
    bounds = on_host(start_loc)
    return max(b - a for a, b in pairwise(bounds))
