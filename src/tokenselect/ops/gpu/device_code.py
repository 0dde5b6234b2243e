"""Device functions that several kernels share: where a token lies, and a vector rotated."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "after_predecessor",
    "first_slot",
    "is_served",
    "load_halves",
    "load_rotated",
    "load_rotation",
    "rotary_pairs",
    "slots_of",
]


@triton.jit
def after_predecessor(OVERLAP: tl.constexpr):
    """In every kernel: begin while the one before still runs, and go on when it has ended and all it wrote is there.

    Every program must come by here: so what the kernels before that one wrote is there from the start. But those of a
    block that is served may end at once if all later ones do: nothing is written for it, and a kernel begins when the
    programs of the one before it have come by or ended.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def is_served(served, block):
    """Whether a block's last selection serves again; never where there is no such memory."""
    return False if served is None else tl.load(served + block) != 0


@triton.jit
def slots_of(positions, page_row, page_size, start, is_token, ONE_PAGE: tl.constexpr):
    """Rows of the cache that hold `positions` of a sequence whose pages begin at `page_row`.

    `start` is what `first_slot` made of the first position.
    """
    if ONE_PAGE:
        return start + positions
    padded = start + positions
    page = tl.load(page_row + padded // page_size, mask=is_token, other=0)
    return page * page_size + padded % page_size


@triton.jit
def first_slot(page_row, page_size, padding, begin, ONE_PAGE: tl.constexpr):
    """Where the position `begin` lies: its row in the cache, or counted over the sequence's pages."""
    if ONE_PAGE:
        return tl.load(page_row) * page_size + padding + begin
    return padding + begin


@triton.jit
def rotary_pairs(d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each dimension its angle, the dimension it is paired with, and the sign of that one's sine."""
    if INTERLEAVED:
        is_first = d % 2 == 0
        angle = d // 2
        partner = tl.where(is_first, d + 1, d - 1)
    else:
        is_first = d < HALF
        angle = tl.where(is_first, d, d - HALF)
        partner = tl.where(is_first, d + HALF, d - HALF)
    return angle, partner, tl.where(is_first, -1.0, 1.0)


@triton.jit
def load_rotation(cos, sin, at, d, is_row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Cosines and signed sines [rows, DP] float32 of the rows `at` of the tables; what is not rotated gets 1 and 0."""
    angle, _, sign = rotary_pairs(d, HALF, INTERLEAVED)
    mask = is_row[:, None] & (d < 2 * HALF)[None, :]
    place = (at * HALF)[:, None] + angle[None, :]
    c = tl.load(cos + place, mask=mask, other=1.0)
    s = tl.load(sin + place, mask=mask, other=0.0)
    return c, s * sign[None, :]


@triton.jit
def load_rotated(rows, cos, sin, at, d, is_row, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Vectors [rows, DP] float32 that begin at the pointers `rows`, rotated by the rows `at` of the tables."""
    _, partner, _ = rotary_pairs(d, HALF, INTERLEAVED)
    x = tl.load(rows[:, None] + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    turns = is_row[:, None] & (d < 2 * HALF)[None, :]
    y = tl.load(rows[:, None] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    c, s = load_rotation(cos, sin, at, d, is_row, HALF, INTERLEAVED)
    return x * c + y * s


@triton.jit
def load_halves(rows, cos, sin, at, h, is_row, HALF: tl.constexpr):
    """Both halves [rows, HALF] float32 of vectors, rotated, in the layout that pairs one half with the other."""
    x = tl.load(rows[:, None] + h[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    y = tl.load(rows[:, None] + (h + HALF)[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    place = (at * HALF)[:, None] + h[None, :]
    c = tl.load(cos + place, mask=is_row[:, None], other=1.0)
    s = tl.load(sin + place, mask=is_row[:, None], other=0.0)
    return x * c - y * s, y * c + x * s
