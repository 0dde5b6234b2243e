"""The soft vote on a GPU: how many programs share the keys, and what they leave for each other."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenselect.ops.gpu.bounds import is_capturing, is_known, on_device, on_host, overlap, precision, remember
from tokenselect.ops.gpu.score_kernels import (
    BY_TILE,
    BY_TOKEN,
    ONCE,
    PIECE,
    reduce_rows,
    score_tiles,
    sum_votes,
)
from tokenselect.ops.gpu.topk import Maxima
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances

# Rows of one product with a tile of keys
_LEAST_ROWS, _MOST_ROWS = (8, 32) if torch.version.hip is None else (16, 32)
_LEAST_DEPTH = 32  # of a product of integers
_WARPS, _STAGES, _STAGES_MANY = 4, 3, 2  # where many rows meet keys of 2 bytes, or of many blocks
_WARPS_FEW_ROWS = 2  # where a product of integers has no more rows than it must
_MOST_WEIGHTS = 2**29  # exponentials kept at once: 1 GiB
_LEAST_TILES_EACH, _MOST_TILES_EACH, _PROGRAMS = 4, 32, 1024
_AT_ONCE, _LONG_STRETCH = 512, 16  # programs that fit on the chip at once, and tiles that each of them may have then
_TOKEN_ROWS_SUMMED = 8192  # of all KV heads that a program sums at once
_ONCE, _BY_TILE, _BY_TOKEN, _PIECE = (int(how.value) for how in (ONCE, BY_TILE, BY_TOKEN, PIECE))


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
    key_center: Tensor | None = None,
    horizon: float = 0.0,
    prior: float = 0.0,
    spans: Spans | None = None,
    served: Tensor | None = None,
    maxima: Maxima | None = None,
    is_settled: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.score_tokens`.

    `spans` is given where they, or bounds of them, are known without asking the device; `served`, [num_blocks] int64,
    is not 0 for blocks that need no votes, which must not share reads of the keys. `maxima`, for `topk_tokens`, are
    written to where there is no `context`. `is_settled`: the last launch wrote no argument but `keys`.
    """
    candidates = candidates.contiguous()
    context = candidates if context is None else context.contiguous()
    spans = _spans(sequences, candidates, context, pages) if spans is None else spans
    votes = torch.empty(spans.num_votes, dtype=torch.float32, device=keys.device)
    call = _Call(
        queries.contiguous(),
        keys if keys.stride(2) == 1 else keys.contiguous(),
        key_scales,
        None if key_center is None else key_center.contiguous(),
        pages,
        sequences.contiguous(),
        candidates,
        context,
        [_whole(view) for view in distances],
        scale,
        float(horizon) if horizon else None,
        float(prior),
        served,
        maxima,
        is_settled and served is None and _are_contiguous(queries, key_center),
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
class _Rows:
    """Rows of one product: (view, block, head of the group), heads padded to a power of 2."""

    group: int
    group_pad: int
    blocks: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one call, checked and contiguous."""

    queries: Tensor
    keys: Tensor
    key_scales: Tensor | None
    key_center: Tensor | None
    pages: PageTable
    sequences: Tensor
    candidates: Tensor
    context: Tensor
    views: list[Distances]
    scale: float
    horizon: float | None
    prior: float
    served: Tensor | None
    maxima: Maxima | None
    is_settled: bool

    def score(self, part: _Part, spans: Spans, votes: Tensor) -> None:
        """Fill in the votes of some blocks."""
        num_kv_heads, device = self.keys.shape[1], self.keys.device
        launches, block_t = self._launches(), _tile(self.views, self.queries.shape[0])
        shape = self._rows(part, launches)
        groups = -(-(part.last - part.first) // shape.blocks)
        num_tiles = max(1, -(-max(spans.longest[part.first : part.last]) // block_t))
        tiles_each = self._tiles_each(num_tiles * num_kv_heads * groups)
        shares = -(-num_tiles // tiles_each)
        kept = torch.float32 if self.keys.dtype == torch.float32 else torch.float16
        places = (len(launches), groups, num_kv_heads)
        weights = torch.empty((*places, num_tiles * block_t, shape.rows), dtype=kept, device=device)
        pieces, rounded = block_t // _PIECE, torch.float32 if kept == torch.float32 else torch.int16
        peaks = torch.empty((*places, num_tiles * pieces, shape.rows), dtype=rounded, device=device)
        stats = torch.empty((*places, shares, shape.rows, 3), dtype=torch.float32, device=device)
        totals = torch.empty((*places, shape.rows, 3), dtype=torch.float32, device=device)

        blocks, own = part.last - part.first, slice(part.first, part.last)
        candidates, context = self.candidates[own], self.context[own]
        served = None if self.served is None else self.served[own]
        maxima, num_listed, chunks = None, None, 0
        if self.maxima is not None:
            chunks = self.maxima.chunks
            maxima, num_listed = self.maxima.values[part.first * chunks :], self.maxima.num_listed[part.first :]
        for i, launch in enumerate(launches):
            self._score_views(launch, shape, own, block_t, tiles_each, weights[i], peaks[i], stats[i])
            reduce_rows[groups, num_kv_heads, shape.rows](
                stats[i], totals[i], context, served, maxima, num_listed, chunks, blocks, shares, tiles_each * block_t,
                BLOCKS=shape.blocks, ROWS=shape.rows, GROUP_PAD=shape.group_pad, BLOCK=256, num_warps=4,
                **overlap(device),
            )  # fmt: skip
        kv_pad, room = _power_of_2(num_kv_heads), max(1, _TOKEN_ROWS_SUMMED // (block_t * shape.rows))
        at_once = kv_pad if self.served is None else 1  # fewer programs where they may have nothing to do
        tiles_summed = max(1, room // at_once)
        sum_votes[groups, -(-num_tiles // tiles_summed)](
            weights, peaks, totals, candidates, context, served, spans.start_loc[part.first :], votes, maxima,
            self.horizon, self.prior, blocks, num_tiles * pieces, groups, chunks, KV=num_kv_heads, KV_PAD=kv_pad,
            KV_AT_ONCE=max(1, min(kv_pad, room // tiles_summed)), GROUP=shape.group,
            GROUP_PAD=shape.group_pad, BLOCKS=shape.blocks, LAUNCHES=len(launches), ROWS=shape.rows,
            PIECES=tiles_summed * pieces,
            num_warps=8 if self.served is not None and kv_pad > 4 else 4, **overlap(device),  # 4 had to spill
        )  # fmt: skip

    def _tiles_each(self, tiles: int) -> int:
        """Tiles of a program: few enough that all programs run at once, but no long stretch."""
        at_once = tiles // _AT_ONCE
        if self.served is None and at_once > _LONG_STRETCH:
            at_once = tiles // _PROGRAMS
        return min(_MOST_TILES_EACH, max(_LEAST_TILES_EACH, at_once))

    def _launches(self) -> list[tuple[list[Distances], int]]:
        """Views that one launch scores, and how the last of them rotates."""
        hows = [_how(view, self.views, self.queries.shape[0]) for view in self.views]
        if len(self.views) == 2 and hows[0] == _ONCE and hows[1] != _BY_TOKEN:
            return [(self.views, hows[1])]
        return [([view], how) for view, how in zip(self.views, hows, strict=True)]

    def _rows(self, part: _Part, launches: list[tuple[list[Distances], int]]) -> _Rows:
        group, views = self.queries.shape[1] // self.keys.shape[1], len(launches[0][0])
        alone = any(how == _BY_TOKEN for _, how in launches)
        most = 16 if self.keys.dtype == torch.float32 else _MOST_ROWS
        group_pad = _power_of_2(group)
        blocks = 1 if alone else max(1, min(_power_of_2(part.together), most // (group_pad * views)))
        group_pad = max(group_pad, _LEAST_ROWS // (blocks * views))
        return _Rows(group, group_pad, blocks, views * blocks * group_pad)

    def _score_views(
        self,
        launch: tuple[list[Distances], int],
        shape: _Rows,
        own: slice,
        block_t: int,
        tiles_each: int,
        weights: Tensor,
        peaks: Tensor,
        stats: Tensor,
    ) -> None:
        views, how = launch
        first, last, pages = views[0], views[-1], self.pages
        scales = self.keys if self.key_scales is None else self.key_scales
        center = self.queries if self.key_center is None else self.key_center
        dim, exact = self.queries.shape[2], self.keys.dtype == torch.float32
        runs, last_runs = first.run_start_loc[own.start :], last.run_start_loc[own.start :]
        rotations = (first.cos, first.sin, runs, last.cos, last.sin, last_runs)
        sizes = {
            "D": dim, "DP": max(_LEAST_DEPTH, _power_of_2(dim)), "HALF": first.cos.shape[1], "GROUP": shape.group,
            "GROUP_PAD": shape.group_pad, "BLOCKS": shape.blocks, "BLOCK_T": block_t, "VIEWS": len(views),
            "INTERLEAVED": first.interleaved, "PRECISION": precision(self.keys), **overlap(self.keys.device),
        }  # fmt: skip
        served = None if self.served is None else self.served[own]
        is_few, is_narrow = shape.rows == _LEAST_ROWS, self.key_scales is not None
        in_flight = _STAGES if shape.blocks == 1 and (is_few or is_narrow) else _STAGES_MANY
        score_tiles[peaks.shape[0], peaks.shape[1], stats.shape[2]](
            self.queries[own], self.keys, scales, center, pages.pages, on_device(pages.padding, self.keys.device),
            self.sequences[own], self.candidates[own], self.context[own], served,
            *rotations, None if last.alike is None else last.alike[own], weights, peaks, stats,
            self.scale, own.stop - own.start, weights.shape[2] // block_t, tiles_each, pages.page_size, last.run_size,
            self.keys.stride(0), self.keys.stride(1), scales.stride(0), scales.stride(1), pages.pages.stride(0),
            **sizes, HOW=how, ONE_PAGE=pages.pages.shape[1] == 1, HAS_SCALES=self.key_scales is not None,
            HAS_CENTER=self.key_center is not None, HAS_CONTEXT=self.context is not self.candidates,
            SETTLED=self.is_settled,
            num_warps=_WARPS_FEW_ROWS if is_few and is_narrow else _WARPS,
            STAGES=1 if exact or how == _BY_TOKEN else in_flight,
        )  # fmt: skip


def _are_contiguous(*given: Tensor | None) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in given)


def _whole(view: Distances) -> Distances:
    if view.cos.is_contiguous() and view.sin.is_contiguous():
        return view
    return replace(view, cos=view.cos.contiguous(), sin=view.sin.contiguous())


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
