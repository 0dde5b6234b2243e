"""Inputs that every backend is tested on: ragged batches in caches whose other rows are NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tokenselect.ops import reference
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances

if TYPE_CHECKING:
    from torch import Tensor

    from tokenselect.ops import Backend

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # absolute, of outputs of size 1
HEADS = [(1, 1), (4, 4), (9, 3), (4, 1), (7, 1)]  # groups of 1, 1, 3, 4, 7


def shapes(value: object) -> str:
    if isinstance(value, tuple):
        return f"Hq{value[0]}-Hkv{value[1]}"
    return str(value).removeprefix("torch.")


def angles(length: int, half: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions `0 .. length - 1`."""
    frequencies = base ** -(torch.arange(half) / half)
    angle = torch.arange(length)[:, None] * frequencies
    return angle.cos(), angle.sin()


def naive_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Pairs as complex numbers; `cos` may be longer than 1 by a factor, as a mean rotation may be shorter."""
    half = cos.shape[-1]
    even, odd = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    turned = torch.complex(x[..., even].double(), x[..., odd].double()) * torch.complex(cos.double(), sin.double())
    out = x.double().clone().expand(*turned.shape[:-1], -1).clone()
    out[..., even], out[..., odd] = turned.real, turned.imag
    return out


@dataclass
class Paged:
    """Sequences in a cache whose other rows are NaN."""

    keys: Tensor  # rows
    values: Tensor
    pages: PageTable


def paged(sequences: list[tuple[Tensor, Tensor]], page_size: int) -> Paged:
    """Sequences [T, Hkv, D] in shuffled pages."""
    need = [-(-len(k) // page_size) for k, _ in sequences]
    free = torch.randperm(sum(need) + 3)
    shape = (len(free) * page_size, *sequences[0][0].shape[1:])
    cache = [torch.full(shape, float("nan"), dtype=sequences[0][0].dtype) for _ in range(2)]
    pages = torch.full((len(sequences), max(need)), -1)
    for i, parts in enumerate(sequences):
        pages[i, : need[i]], free = free[: need[i]], free[need[i] :]
        table = PageTable(pages, page_size, [0] * len(sequences))
        rows = table.slots(i, torch.arange(len(parts[0])))
        cache[0][rows], cache[1][rows] = parts
    return Paged(*cache, PageTable(pages, page_size, [0] * len(sequences)))


def contiguous(sequences: list[tuple[Tensor, Tensor]], padded: bool) -> Paged:
    """Sequences as rows of [B, Hkv, capacity, D], as in Transformers: one page each, maybe left-padded."""
    longest = max(len(k) for k, _ in sequences)
    heads, dim = sequences[0][0].shape[1:]
    capacity = longest + 5
    cache = [torch.full((len(sequences), heads, capacity, dim), float("nan")) for _ in range(2)]
    padding = [longest - len(k) if padded else 0 for k, _ in sequences]
    for i, parts in enumerate(sequences):
        for whole, part in zip(cache, parts, strict=True):
            whole[i, :, padding[i] : padding[i] + len(part)] = part.transpose(0, 1).float()
    rows = [
        whole.to(sequences[0][0].dtype).as_strided(
            ((len(sequences) * heads - heads + 1) * capacity, heads, dim), (dim, capacity * dim, 1)
        )
        for whole in cache
    ]
    return Paged(*rows, PageTable(torch.arange(len(sequences))[:, None] * heads, capacity, padding))


LAYOUTS = {
    "page1": lambda sequences: paged(sequences, 1),
    "page3": lambda sequences: paged(sequences, 3),
    "page16": lambda sequences: paged(sequences, 16),
    "strided": lambda sequences: contiguous(sequences, padded=False),
    "padded": lambda sequences: contiguous(sequences, padded=True),
}


def sequences_of(lengths: list[int], heads: int, dim: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, heads, dim).to(dtype), torch.randn(n, heads, dim).to(dtype)) for n in lengths]


@dataclass
class Votes:
    """Two sequences, blocks at different places, and the views they vote by."""

    cache: Paged
    sequences: list[tuple[Tensor, Tensor]]
    queries: Tensor
    of: Tensor
    candidates: Tensor
    context: Tensor | None
    views: list[Distances]
    scale: float
    horizon: float = 0.0
    prior: float = 0.0

    def score(self, ops: Backend = reference) -> tuple[Tensor, Tensor]:  # type: ignore[assignment]
        return ops.score_tokens(
            self.queries,
            self.cache.keys,
            self.cache.pages,
            self.of,
            self.candidates,
            self.views,
            self.scale,
            self.context,
            horizon=self.horizon,
            prior=self.prior,
        )


def views_of(scoring: str, lengths: list[int], half: int, interleaved: bool) -> list[Distances]:
    """One rotation per block, or per run of 4 tokens, or both; each random, and not of length 1."""

    def view(run_size: int, counts: list[int]) -> Distances:
        angle = torch.rand(sum(counts), half) * 6
        return Distances(
            0.9 * angle.cos(), 0.9 * angle.sin(), run_size, torch.tensor([0, *counts]).cumsum(0), interleaved
        )

    free = [view(1, [1] * len(lengths))] if scoring in ("position_free", "mix") else []
    return free + ([view(4, [-(-n // 4) for n in lengths])] if scoring in ("distance", "mix") else [])


def votes_case(
    layout: str = "page3",
    heads: tuple[int, int] = (6, 2),
    dim: int = 16,
    scoring: str = "mix",
    *,
    context: bool = False,
    half: int = 8,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    horizon: float = 0.0,
    prior: float = 0.0,
) -> Votes:
    sequences = sequences_of([41, 60], heads[1], dim, dtype)
    of, ends = torch.tensor([0, 1, 1, 1]), [30, 23, 24, 53]
    candidates = torch.tensor([[3, end] for end in ends])
    spans = torch.tensor([[0, end + 5] for end in ends]) if context else None
    lengths = [int(b - a) for a, b in (candidates if spans is None else spans)]
    queries = torch.randn(4, heads[0], dim)
    views = views_of(scoring, lengths, half, interleaved)
    return Votes(LAYOUTS[layout](sequences), sequences, queries, of, candidates, spans, views, 0.3, horizon, prior)


@dataclass
class Sparse:
    """A ragged batch: a prompt's block, a decode step and other blocks, each with its own choice."""

    sequences: list[tuple[Tensor, Tensor]]
    cache: Paged
    queries: Tensor
    blocks: list[tuple[int, list[int], int]]  # sequence, attended positions, how many of them are its own
    cos: Tensor
    sin: Tensor
    options: dict[str, object]
    scale: float = 0.2

    def run(self, ops: Backend = reference) -> Tensor:  # type: ignore[assignment]
        slots = [self.cache.pages.slots(row, torch.tensor(positions)) for row, positions, _ in self.blocks]
        return ops.sparse_attention(
            self.queries,
            self.cache.keys,
            self.cache.values,
            torch.tensor([0, *(own for _, _, own in self.blocks)]).cumsum(0),
            torch.cat(slots),
            torch.tensor([0, *(len(part) for part in slots)]).cumsum(0),
            self.cos,
            self.sin,
            self.scale,
            **self.options,  # type: ignore[arg-type]
        )


def sparse_case(
    layout: str = "page3",
    heads: tuple[int, int] = (6, 2),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    half: int | None = None,
    **options: object,
) -> Sparse:
    sequences = sequences_of([41, 29, 60], heads[1], dim, dtype)
    blocks = [
        (0, [0, 1, 5, 9, 17, 33, 34, 35, 36, 37, 38, 39, 40], 5),
        (1, [*range(0, 29, 3), 28], 1),
        (2, [2, 3, *range(40, 60)], 7),
        (0, list(range(9)), 9),
    ]
    cos, sin = angles(64, half or dim // 2)
    queries = torch.randn(22, heads[0], dim).to(dtype)
    return Sparse(sequences, LAYOUTS[layout](sequences), queries, blocks, cos, sin, options)
