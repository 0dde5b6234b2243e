"""Sparse attention on a GPU: which kernel serves which block."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tokenselect.ops.gpu.attention_kernels import attend_few, attend_many, gather_rotated, join_splits
from tokenselect.ops.gpu.bounds import has_halves, on_device, on_host, overlap, precision

_MOST_ROWS = 64  # queries times heads of a group that gather for themselves
_PROGRAMS = 700  # that fill a chip, about, with as many again to follow
_FEW_KEYS, _FEW_WARPS = 32, 4  # per step of a program with few queries
_GATHER = 32


class Last(NamedTuple):
    """The last selections of the blocks of a step, one of each sequence; see `reuse.decide_reuse`.

    Attributes:
        numbers: [at least 1, B] int64, first where the windows began.
        positions: [B] int64, of the queries.
        firsts: [B] int64, rows of the cache that hold the sequences' first tokens.
        num_fixed: slots before those of the window.
        num_slots: of a sequence, attended or not.
    """

    numbers: Tensor
    positions: Tensor
    firsts: Tensor
    num_fixed: int
    num_slots: int


_NOTHING_LAST = (None, None, None, 0, 0)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks that one kernel serves.

    Attributes:
        bounds: four numbers each: first query, number of queries, first slot, number of slots.
        most_queries: of a block.
        most_slots: of a block.
        num_slots: of all of them.
        starts: where each one's slots begin among those of these blocks.
    """

    bounds: tuple[int, ...]
    most_queries: int
    most_slots: int
    num_slots: int
    starts: tuple[int, ...]


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start_loc: Tensor,
    slots: Tensor,
    slot_start_loc: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    interleaved: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.reference.sparse_attention`."""
    query_bounds, slot_bounds = tuple(on_host(query_start_loc)), tuple(on_host(slot_start_loc))
    few, many = _split(query_bounds, slot_bounds, queries.shape[1] // keys.shape[1])
    has_padding = query_bounds[0] > 0 or query_bounds[-1] < queries.shape[0]
    if out is None:
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if has_padding:
        out.zero_()
    rotation, extras = (cos, sin, scale), (interleaved, softcap, sink_logits)
    call = _Call.of(queries, keys, values, slots, *rotation, *extras, out)
    if few.bounds:
        call.attend_few(few.most_queries, few.most_slots, on_device(few.bounds, queries.device))
    if many.bounds:
        call.attend_many(many)
    return out


def attend_steps(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    bounds: Tensor,
    most_slots: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    out: Tensor,
    *,
    interleaved: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    served: Tensor | None = None,
    last: Last | None = None,
    is_settled: bool = False,
) -> None:
    """`sparse_attention` of blocks of one query, where the device alone knows how many slots each attends.

    Args:
        queries, keys, values, slots, cos, sin, scale, interleaved, softcap, sink_logits: as there.
        bounds: [4 * num_blocks] int64; of each block its query, 1, where its slots begin, how many it attends.
        most_slots: that a block attends.
        out: [num_queries, num_q_heads, head_dim], contiguous; written to.
        served: [num_blocks] int64, not 0 for blocks that attend only where `last` is given; the others do otherwise.
        last: what follows for the blocks that are served; written by no launch but the last one.
        is_settled: the last launch wrote no argument but `keys`, `values` and `slots`.
    """
    rotation, extras = (cos, sin, scale), (interleaved, softcap, sink_logits)
    call = _Call.of(queries, keys, values, slots, *rotation, *extras, out)
    call.attend_few(1, most_slots, bounds, served, last, is_settled and queries.is_contiguous())


@functools.lru_cache(maxsize=64)
def _split(query_bounds: tuple[int, ...], slot_bounds: tuple[int, ...], group: int) -> tuple[_Blocks, _Blocks]:
    """Blocks of few queries, and of many; those without queries are nobody's."""
    sizes = [b - a for a, b in pairwise(query_bounds)]
    few = [i for i, own in enumerate(sizes) if own and own * group <= max(_MOST_ROWS, group)]
    many = [i for i, own in enumerate(sizes) if own * group > max(_MOST_ROWS, group)]

    def blocks(ids: list[int]) -> _Blocks:
        lengths = [slot_bounds[i + 1] - slot_bounds[i] for i in ids]
        starts = list(accumulate(lengths, initial=0))
        most_queries = max((sizes[i] for i in ids), default=0)
        bounds = [
            at for i in ids for at in (query_bounds[i], sizes[i], slot_bounds[i], slot_bounds[i + 1] - slot_bounds[i])
        ]
        return _Blocks(tuple(bounds), most_queries, max(lengths, default=0), starts[-1], tuple(starts[:-1]))

    return blocks(few), blocks(many)


def _rows(cache: Tensor) -> Tensor:
    """The kernels take any strides between rows and heads, but whole vectors."""
    return cache if cache.stride(2) == 1 else cache.contiguous()


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one call, checked and contiguous."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    scale: float
    interleaved: bool
    softcap: float | None
    sink_logits: Tensor | None
    out: Tensor

    @classmethod
    def of(
        cls,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        interleaved: bool,
        softcap: float | None,
        sink_logits: Tensor | None,
        out: Tensor,
    ) -> _Call:
        """Make the arguments contiguous."""
        sinks = None if sink_logits is None else sink_logits.float().contiguous()
        rows, rotation = (_rows(keys), _rows(values), slots), (cos.contiguous(), sin.contiguous(), scale)
        return cls(queries.contiguous(), *rows, *rotation, interleaved, softcap, sinks, out)

    def attend_few(
        self,
        most_queries: int,
        most_slots: int,
        bounds: Tensor,
        served: Tensor | None = None,
        last: Last | None = None,
        is_settled: bool = False,
    ) -> None:
        """Split the slots of every block over programs, then join what they found."""
        (_, heads, dim), num_kv_heads, device = self.queries.shape, self.keys.shape[1], self.keys.device
        group, count = heads // num_kv_heads, bounds.shape[0] // 4
        splits = max(1, min(_PROGRAMS // (count * num_kv_heads), -(-most_slots // _FEW_KEYS)))
        rows, padded = max(16, _power_of_2(most_queries * group)), max(16, _power_of_2(dim))
        parts = torch.empty((count, num_kv_heads, splits, rows, padded), dtype=torch.float32, device=device)
        sums = torch.empty((count, num_kv_heads, splits, rows, 2), dtype=torch.float32, device=device)
        attend_few[count, num_kv_heads, splits](
            self.queries, self.keys, self.values, self.slots, self.cos, self.sin, bounds,
            served, *(last or _NOTHING_LAST), parts, sums, self.scale, self.softcap or 1.0, *self._strides(), splits,
            D=dim, DP=padded, HALF=self.cos.shape[1], GROUP=group, ROWS=rows, BLOCK_N=_FEW_KEYS,
            INTERLEAVED=self.interleaved, HALVES=self._has_halves(), HAS_CAP=bool(self.softcap),
            PRECISION=precision(self.queries), IF_SERVED=last is not None, SETTLED=is_settled,
            num_warps=_FEW_WARPS, num_stages=1, **overlap(device),
        )  # fmt: skip
        sinks = sums if self.sink_logits is None else self.sink_logits
        join_splits[count, num_kv_heads, most_queries * group](
            parts, sums, sinks, bounds, served, self.out, splits,
            D=dim, DP=padded, GROUP=group, ROWS=rows, SPLITS=_power_of_2(splits),
            HAS_SINKS=self.sink_logits is not None, IF_SERVED=last is not None, num_warps=4, **overlap(device),
        )  # fmt: skip

    def attend_many(self, blocks: _Blocks) -> None:
        """Gather and rotate once, then attend as if these rows were all there are."""
        (_, heads, dim), num_kv_heads, device = self.queries.shape, self.keys.shape[1], self.keys.device
        padded, count = max(16, _power_of_2(dim)), len(blocks.starts)
        shape = (num_kv_heads, blocks.num_slots, padded)
        keys, values = (torch.empty(shape, dtype=self.queries.dtype, device=device) for _ in range(2))
        bounds, starts = on_device(blocks.bounds, device), on_device(blocks.starts, device)
        gather_rotated[-(-blocks.most_slots // _GATHER), num_kv_heads, count](
            self.keys, self.values, self.slots, self.cos, self.sin, bounds, starts, keys, values,
            blocks.num_slots, *self._strides(),
            D=dim, DP=padded, HALF=self.cos.shape[1], BLOCK_N=_GATHER, INTERLEAVED=self.interleaved,
            HALVES=self._has_halves(), num_warps=4, **overlap(device),
        )  # fmt: skip
        block_m, block_n, warps, stages = _tiles(self.queries.dtype, padded, device)
        sinks = self.cos if self.sink_logits is None else self.sink_logits
        attend_many[-(-blocks.most_queries // block_m), heads, count](
            self.queries, keys, values, self.cos, self.sin, sinks, bounds, starts,
            self.out, self.scale, self.softcap or 1.0, blocks.num_slots,
            D=dim, DP=padded, HALF=self.cos.shape[1], GROUP=heads // num_kv_heads, BLOCK_M=block_m,
            BLOCK_N=block_n, INTERLEAVED=self.interleaved, HAS_CAP=bool(self.softcap),
            HAS_SINKS=self.sink_logits is not None, PRECISION=precision(self.queries),
            num_warps=warps, num_stages=stages, **overlap(device),
        )  # fmt: skip

    def _has_halves(self) -> bool:
        return has_halves(self.queries.shape[2], self.cos.shape[1], self.interleaved)

    def _strides(self) -> tuple[int, int, int, int]:
        return self.keys.stride(0), self.keys.stride(1), self.values.stride(0), self.values.stride(1)


def _tiles(dtype: torch.dtype, padded: int, device: torch.device) -> tuple[int, int, int, int]:
    """Queries and keys per step, warps and stages, so that shared memory and registers hold them."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if padded > 128 else (64, 32, 4, 1)
    room = _shared_memory(device)
    if padded > 128:
        return (64, 32, 4, 2) if room > 100_000 else (64, 32, 4, 1)
    if room > 225_000:  # Hopper and later
        return 128, 128, 8, 3
    return (128, 64, 8, 2) if room > 160_000 else (64, 64, 4, 2 if room > 90_000 else 1)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return 64 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024))


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
