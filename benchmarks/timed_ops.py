"""Backends around a backend: one that times each operation, one that scores an int8 copy of the keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances

_ROWS_AT_ONCE = 1 << 16


class TimedOps:
    """Adds up the seconds of each operation.

    Attributes:
        seconds: by operation, since it was last cleared.
    """

    def __init__(self, ops: Backend) -> None:
        self.NAME, self.why_not = ops.NAME, ops.why_not
        self.seconds: dict[str, float] = {}
        self.score_tokens = self._timed("score", ops.score_tokens)
        self.topk_tokens = self._timed("topk", ops.topk_tokens)
        self.sparse_attention = self._timed("attend", ops.sparse_attention)

    def _timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = operation(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return call


class Int8Scoring:
    """Scores an int8 copy of the keys, made here once; attention reads the keys themselves.

    Args:
        ops: who computes.
        keys: [num_rows, num_kv_heads, head_dim], the rows that will be scored.
    """

    def __init__(self, ops: Backend, keys: Tensor) -> None:
        self.NAME, self.why_not = ops.NAME, ops.why_not
        self.topk_tokens, self.sparse_attention = ops.topk_tokens, ops.sparse_attention
        self._ops = ops
        self._copy, self._scales = int8_copy(keys)

    def score_tokens(
        self,
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
        """See `ops.reference.score_tokens`; `keys` are what the copy was made of."""
        given = (pages, sequences, candidates, distances, scale, context, self._scales)
        return self._ops.score_tokens(queries, self._copy, *given)


def int8_copy(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in -127 .. 127 that lie in memory as the keys do, heads one after the other, and a scale per token and
    head [num_rows, num_kv_heads]."""
    rows, heads, dim = keys.shape
    copy = torch.empty(heads, rows, dim, dtype=torch.int8).transpose(0, 1)
    scales = torch.empty(rows, heads)
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        numbers = keys[part].float()
        scales[part] = numbers.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        copy[part] = (numbers / scales[part, :, None]).round().to(torch.int8)
    return copy, scales
