"""`score_tokens`: one block's vote over all candidates, keys contiguous or in pages, bf16 or an int8 copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.buffers import as_rows, num_copies, random_bf16, random_int8
from benchmarks.operations.case import Call, Case, relative_error
from benchmarks.shapes import SHAPES, Shape
from tokenselect.config import TokenSelectConfig
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances, aged, rotate
from tokenselect.selection import Block, SelectionPlan, plan_selection

SCORINGS = ("merged", "mix", "position_free", "distance")
KEYS = ("bf16", "int8")
LAYOUTS = ("contiguous", "pages of 256", "pages of 16")
# Votes are shares of 1: what counts is the error next to the vote. The baseline rounds its logits to bf16.
_TOLERANCE = 5e-2
_CONFIG = TokenSelectConfig()  # how votes count by age


@dataclass(frozen=True, slots=True)
class _Keys:
    """Buffers [copies, T * Hkv * D] of a sequence's keys, and of the scales [copies, T * Hkv] of an int8 copy."""

    shape: Shape
    length: int
    numbers: Tensor
    scales: Tensor | None
    center: Tensor | None

    @classmethod
    def make(cls, shape: Shape, length: int, kind: str) -> _Keys:
        own = length * shape.num_kv_heads * shape.head_dim
        if kind == "bf16":
            return cls(shape, length, random_bf16(num_copies(2 * own), own), None, None)
        copies = num_copies(own)
        scales = torch.rand(copies, length * shape.num_kv_heads).add_(0.5).div_(127)
        center = torch.randn(1, shape.num_kv_heads, shape.head_dim)
        return cls(shape, length, random_int8(copies, own), scales, center)

    def rows(self, copy: int, layout: str) -> Tensor:
        """[T, Hkv, D]: heads one after the other, or tokens one after the other as in vLLM's pages."""
        shape, numbers = self.shape, self.numbers[copy]
        if layout == "contiguous":
            return as_rows(numbers.view(shape.num_kv_heads, self.length, shape.head_dim))
        return numbers.view(self.length, shape.num_kv_heads, shape.head_dim)

    def row_scales(self, copy: int, layout: str) -> Tensor | None:
        """[T, Hkv], in the order of the keys; None: they are no int8 copy."""
        if self.scales is None:
            return None
        if layout == "contiguous":
            return self.scales[copy].view(self.shape.num_kv_heads, self.length).T
        return self.scales[copy].view(self.length, self.shape.num_kv_heads)

    def page_table(self, layout: str) -> PageTable:
        """One page, or pages in random order."""
        if layout == "contiguous":
            return PageTable(torch.zeros(1, 1, dtype=torch.int64), self.length, [0])
        size = int(layout.removeprefix("pages of "))
        return PageTable(torch.randperm(self.length // size)[None], size, [0])


class Score(Case):
    """Votes of a block of 512 queries, pooled already, that follows `length` tokens."""

    def __init__(self, name: str, keys: _Keys, kind: str, scoring: str, layout: str) -> None:
        shape = keys.shape
        self.key = {"operation": "score_tokens", "scoring": scoring, "keys": kind, "layout": layout, "queries": 1}
        self.key |= {"shape": name, "length": keys.length}
        self.keys, self.layout, self.pages = keys, layout, keys.page_table(layout)
        self.plan = _plan(shape, keys.length, scoring)
        self.queries = torch.randn(1, shape.num_q_heads, shape.head_dim)
        self.pools = [keys.numbers] if keys.scales is None else [keys.numbers, keys.scales]
        self.num_variants = len(keys.numbers)
        first, last = self.plan.candidates[0].tolist()
        per_token = shape.head_dim * keys.numbers.itemsize + (0 if keys.scales is None else 4)
        self.num_bytes = (last - first) * shape.num_kv_heads * per_token

    def compute(self, ops: Backend, variant: int) -> Tensor:
        """Votes of all candidates."""
        plan = self.plan
        votes, _ = ops.score_tokens(
            self.queries,
            self.keys.rows(variant, self.layout),
            self.pages,
            plan.sequences,
            plan.candidates,
            plan.distances,
            self.keys.shape.scale,
            None,
            self.keys.row_scales(variant, self.layout),
            self.keys.center,
            _CONFIG.vote_horizon,
            _CONFIG.vote_prior,
        )
        return votes

    def baselines(self) -> dict[str, Call]:
        """Matrix products in bf16; pages and integers would have to be copied first, so there is none for them."""
        plain = self.layout == "contiguous" and self.keys.scales is None
        return {"torch matmul": self._matmul} if plain else {}

    def _matmul(self, variant: int) -> Tensor:
        first, last = self.plan.candidates[0].tolist()
        keys = self.keys.rows(variant, self.layout).transpose(0, 1)[:, first:last]
        votes = torch.stack([self._vote(keys, view) for view in self.plan.distances]).sum(0)
        return aged(votes, _CONFIG.vote_horizon, _CONFIG.vote_prior)

    def _vote(self, keys: Tensor, view: Distances) -> Tensor:
        """Votes [T] of one view of the distances; a run that is not full keeps it from being one product."""
        heads, length, dim = keys.shape
        runs = view.cos.shape[0]
        turned = rotate(self.queries[0, :, None], view.cos, view.sin, view.interleaved).to(keys.dtype)
        turned = turned.view(heads, -1, runs, dim).transpose(1, 2)  # [Hkv, runs, group, D]
        logits = turned @ keys.reshape(heads, runs, length // runs, dim).transpose(2, 3)
        logits = logits.transpose(1, 2).reshape(-1, length)
        votes = torch.softmax(logits.float() * self.keys.shape.scale, dim=-1).sum(0)
        return votes / votes.sum()

    def difference(self, result: Any, expected: Any) -> str | None:
        """Votes must be close, next to their size."""
        error = relative_error(result, expected)
        return None if error <= _TOLERANCE else f"relative error of the votes {error:.3g}, allowed {_TOLERANCE}"


def cases(name: str, length: int, scorings: list[str], kinds: list[str], layouts: list[str]) -> Iterator[Score]:
    """Those of one shape and length; the keys are made once for all that share them."""
    for kind in kinds:
        keys = _Keys.make(SHAPES[name], length, kind)
        for layout in layouts:
            for scoring in scorings:
                yield Score(name, keys, kind, scoring, layout)


def _plan(shape: Shape, length: int, scoring: str) -> SelectionPlan:
    config = TokenSelectConfig(scoring=scoring, num_dense_tokens=0)  # type: ignore[arg-type]
    table = shape.rotary_table(config.budget)
    return plan_selection([Block(0, length, length + config.block_size, 0)], config, table, shape.max_distance)
