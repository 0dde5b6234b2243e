"""The soft vote on a GPU: how many programs share the keys, and what they leave for each other."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenselect.ops.gpu.bounds import is_capturing, is_known, on_device, on_host, precision, remember
from tokenselect.ops.gpu.score_kernels import BY_TILE, BY_TOKEN, ONCE, reduce_rows, score_tiles, sum_votes
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances

_LEAST_ROWS, _MOST_ROWS = 16, 32  # of one product with a tile of keys
_WARPS, _STAGES = 4, 3
_MOST_WEIGHTS = 2**29  # exponentials kept at once: 1 GiB
_LEAST_TILES_EACH, _MOST_TILES_EACH, _PROGRAMS = 4, 32, 4096
_TILES_SUMMED = 4
_ONCE, _BY_TILE, _BY_TOKEN = (how.value for how in (ONCE, BY_TILE, BY_TOKEN))


@dataclass(frozen=True, slots=True)
class Spans:
    """What the blocks of a forward pass look at, as far as the host must know it.

    Attributes:
        longest: positions of the longest context, of each block where they are known.
        sharing: for each block, how many blocks from it on begin at the same token of the same sequence.
        num_votes: candidates of all blocks.
        start_loc: [num_blocks + 1] int64, where each block's votes begin.
    """

    longest: Sequence[int]
    sharing: Sequence[int]
    num_votes: int
    start_loc: Tensor


def score_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    sequences: Tensor,
    candidates: Tensor,
    distances: Sequence[Distances],
    scale: float,
    context: Tensor | None = None,
    key_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.score_tokens`."""
    candidates = candidates.contiguous()
    context = candidates if context is None else context.contiguous()
    spans = _spans(sequences, candidates, context, pages)
    votes = torch.empty(spans.num_votes, dtype=torch.float32, device=keys.device)
    call = _Call(
        queries.contiguous(),
        keys if keys.stride(2) == 1 else keys.contiguous(),
        key_scales,
        pages,
        sequences.contiguous(),
        candidates,
        context,
        [_whole(view) for view in distances],
        scale,
    )
    for part in _parts(spans, len(distances) * queries.shape[1]):
        call.score(part, spans, votes)
    return votes, spans.start_loc


def _spans(sequences: Tensor, candidates: Tensor, context: Tensor, pages: PageTable) -> Spans:
    if is_capturing(candidates) and not (is_known(candidates) and is_known(context) and is_known(sequences)):
        return _bounded_spans(candidates, pages)
    chosen, seen, of = on_host(candidates), on_host(context), on_host(sequences)
    return _known_spans(tuple(chosen), tuple(seen), tuple(of), candidates.device)


@functools.lru_cache(maxsize=8)
def _known_spans(
    candidates: tuple[int, ...], context: tuple[int, ...], sequences: tuple[int, ...], device: torch.device
) -> Spans:
    firsts = list(zip(sequences, context[::2], strict=True))
    sharing = [1] * len(firsts)
    for i in range(len(firsts) - 2, -1, -1):
        sharing[i] = sharing[i + 1] + 1 if firsts[i] == firsts[i + 1] else 1
    start_loc = [0]
    for low, high in zip(candidates[::2], candidates[1::2], strict=True):
        start_loc.append(start_loc[-1] + high - low)
    longest = [end - start for start, end in zip(context[::2], context[1::2], strict=True)]
    uploaded = torch.tensor(start_loc, dtype=torch.int64, device=device)
    remember(uploaded, start_loc)
    return Spans(longest, sharing, start_loc[-1], uploaded)


def _bounded_spans(candidates: Tensor, pages: PageTable) -> Spans:
    """For a CUDA graph, whose replays may look at longer contexts: everything as large as the cache allows."""
    blocks, longest = candidates.shape[0], pages.pages.shape[1] * pages.page_size
    start_loc = torch.nn.functional.pad((candidates[:, 1] - candidates[:, 0]).cumsum(0), (1, 0))
    return Spans([longest] * blocks, [1] * blocks, blocks * longest, start_loc)


@dataclass(frozen=True, slots=True)
class _Part:
    """Blocks `first .. last - 1`, `together` of which share each read of the keys."""

    first: int
    last: int
    together: int


def _parts(spans: Spans, rows_each: int) -> Iterator[_Part]:
    """Blocks whose exponentials fit in memory together; those that share keys stay together."""
    first = 0
    while first < len(spans.longest):
        room = max(1, _MOST_WEIGHTS // max(1, rows_each * max(spans.longest[first:])))
        shared = spans.sharing[first]
        if shared > 1:
            last = first + min(shared, room)
        else:
            alone = next((i for i in range(first, len(spans.sharing)) if spans.sharing[i] > 1), len(spans.sharing))
            last = min(alone, first + room)
        yield _Part(first, last, last - first if shared > 1 else 1)
        first = last


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one call, checked and contiguous."""

    queries: Tensor
    keys: Tensor
    key_scales: Tensor | None
    pages: PageTable
    sequences: Tensor
    candidates: Tensor
    context: Tensor
    views: list[Distances]
    scale: float

    def score(self, part: _Part, spans: Spans, votes: Tensor) -> None:
        """Fill in the votes of some blocks."""
        blocks, heads, device = part.last - part.first, self.queries.shape[1], self.keys.device
        block_t = _tile(self.views, self.queries.shape[0])
        num_tiles = max(1, -(-max(spans.longest[part.first : part.last]) // block_t))
        rows_each = len(self.views) * heads
        rows = blocks * rows_each
        kept = torch.float32 if self.keys.dtype == torch.float32 else torch.float16
        weights = torch.empty((rows, num_tiles * block_t), dtype=kept, device=device)
        peaks = torch.empty((rows, num_tiles), dtype=torch.float32, device=device)
        totals = torch.empty((rows, 3), dtype=torch.float32, device=device)
        tiles_each = self._tiles_each(part, num_tiles)
        stats = torch.empty((rows, -(-num_tiles // tiles_each), 3), dtype=torch.float32, device=device)
        for launch in self._launches():
            self._score_views(launch, part, block_t, tiles_each, weights, peaks, stats)

        own = slice(part.first, part.last)
        candidates, context = self.candidates[own], self.context[own]
        reduce_rows[rows,](
            stats, totals, context, stats.shape[1], tiles_each * block_t, ROWS_EACH=rows_each, BLOCK=256, num_warps=4
        )
        sum_votes[blocks, -(-num_tiles // _TILES_SUMMED)](
            weights, peaks, totals, candidates, context, spans.start_loc[part.first :], votes, num_tiles,
            HEADS=heads, HEADS_PAD=_power_of_2(heads), VIEWS=len(self.views), BLOCK_T=block_t,
            TILES=_TILES_SUMMED, ROWS=min(8, _power_of_2(rows_each)), num_warps=4,
        )  # fmt: skip

    def _tiles_each(self, part: _Part, num_tiles: int) -> int:
        """Tiles per program: enough programs to fill the chip, few enough to be worth their start."""
        groups = -(-(part.last - part.first) // part.together)
        return max(_LEAST_TILES_EACH, min(_MOST_TILES_EACH, num_tiles * self.keys.shape[1] * groups // _PROGRAMS))

    def _launches(self) -> Iterator[tuple[int, list[Distances], int]]:
        """Views that one launch scores: the first one's index, the views, and how the last of them rotates."""
        hows = [_how(view, self.views, self.queries.shape[0]) for view in self.views]
        if len(self.views) == 2 and hows[0] == _ONCE and hows[1] != _BY_TOKEN:
            yield 0, self.views, hows[1]
        else:
            yield from ((i, [view], hows[i]) for i, view in enumerate(self.views))

    def _score_views(
        self,
        launch: tuple[int, list[Distances], int],
        part: _Part,
        block_t: int,
        tiles_each: int,
        weights: Tensor,
        peaks: Tensor,
        stats: Tensor,
    ) -> None:
        first_view, views, how = launch
        first, last = views[0], views[-1]
        group, dim = self.queries.shape[1] // self.keys.shape[1], self.queries.shape[2]
        blocks, exact = part.last - part.first, self.keys.dtype == torch.float32
        together, group_pad = _rows_together(part.together, group, len(views), exact, how)
        own = slice(part.first, part.last)
        scales = self.keys if self.key_scales is None else self.key_scales
        score_tiles[-(-blocks // together), self.keys.shape[1], stats.shape[1]](
            self.queries[own], self.keys, scales, self.pages.pages, on_device(self.pages.padding, self.keys.device),
            self.sequences[own], self.candidates[own], self.context[own],
            first.cos, first.sin, first.run_start_loc[part.first :],
            last.cos, last.sin, last.run_start_loc[part.first :],
            weights, peaks, stats,
            self.scale, blocks, peaks.shape[1], tiles_each, self.pages.page_size, last.run_size,
            self.keys.stride(0), self.keys.stride(1), scales.stride(0), scales.stride(1), self.pages.pages.stride(0),
            first_view,
            D=dim, DP=max(16, _power_of_2(dim)), HALF=first.cos.shape[1], GROUP=group, GROUP_PAD=group_pad,
            BLOCKS=together, BLOCK_T=block_t, VIEWS=len(views), ALL_VIEWS=len(self.views), HOW=how,
            ONE_PAGE=self.pages.pages.shape[1] == 1, HAS_SCALES=self.key_scales is not None,
            INTERLEAVED=first.interleaved, HAS_CONTEXT=self.context is not self.candidates,
            PRECISION=precision(self.keys), num_warps=_WARPS,
            num_stages=1 if exact or how == _BY_TOKEN else 2 if together > 1 else _STAGES,
        )  # fmt: skip


def _rows_together(blocks: int, group: int, views: int, exact: bool, how: int) -> tuple[int, int]:
    """How many blocks a product takes, and rows for each one's heads: whole tiles of matrix units."""
    group_pad = _power_of_2(group)
    room = (_LEAST_ROWS if exact else _MOST_ROWS) // (group_pad * views)
    together = 1 if how == _BY_TOKEN else max(1, min(_power_of_2(blocks), room))
    return together, max(group_pad, _LEAST_ROWS // (together * views))


def _whole(view: Distances) -> Distances:
    if view.cos.is_contiguous() and view.sin.is_contiguous():
        return view
    return Distances(
        view.cos.contiguous(), view.sin.contiguous(), view.run_size, view.run_start_loc, view.interleaved
    )


def _tile(views: Sequence[Distances], num_blocks: int) -> int:
    """Keys per tile: it should not cut a run."""
    sizes = [view.run_size for view in views if view.cos.shape[0] != num_blocks]
    return next((n for n in (64, 32, 16) if all(size % n == 0 for size in sizes)), 64)


def _how(view: Distances, views: Sequence[Distances], num_blocks: int) -> int:
    """How a view rotates (see `score_kernels`)."""
    if view.cos.shape[0] == num_blocks:
        return _ONCE
    return _BY_TOKEN if view.run_size % _tile(views, num_blocks) else _BY_TILE


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
