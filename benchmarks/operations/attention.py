"""`sparse_attention`: a decode step over 2,688 chosen tokens, and a block of 512 queries over these and itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.buffers import POOL_BYTES, as_rows, num_copies, random_bf16
from benchmarks.operations.case import Call, Case, relative_error
from benchmarks.shapes import SHAPES
from tokenselect.ops import Backend
from tokenselect.ops.reference import gather_rows, rotate

QUERIES = (1, 512)
_SINKS, _SELECTED, _LOCAL = 128, 2048, 512
_MOST_VARIANTS = 256
# Of the outputs in bf16, whose last bit is 0.4%; the definition rounds what the kernels keep in float32.
_TOLERANCE = 2e-2


class Attention(Case):
    """Attention of the last queries of a sequence over sinks, a random choice, the local window and themselves."""

    def __init__(self, name: str, length: int, queries: int) -> None:
        shape = self.shape = SHAPES[name]
        self.key = {"operation": "sparse_attention", "keys": "bf16", "layout": "contiguous", "queries": queries}
        self.key |= {"shape": name, "length": length}
        own = 2 * length * shape.num_kv_heads * shape.head_dim
        caches = (num_copies(2 * own), shape.num_kv_heads, length, shape.head_dim)
        self.pools = [random_bf16(*caches), random_bf16(*caches)]
        attended = _SINKS + _SELECTED + _LOCAL + (queries if queries > 1 else 0)
        self.num_bytes = 4 * attended * shape.num_kv_heads * shape.head_dim
        self.num_flops = 4 * shape.num_q_heads * shape.head_dim * (queries * attended - queries * (queries - 1) // 2)
        self.num_variants = min(_MOST_VARIANTS, -(-POOL_BYTES // self.num_bytes))
        self.slots = [_slots(length, queries) for _ in range(self.num_variants)]
        self.queries = random_bf16(queries, shape.num_q_heads, shape.head_dim)
        table = shape.rotary_table(attended)
        self.cos, self.sin = table.cos, table.sin
        self.bounds = torch.tensor([0, queries]), torch.tensor([0, attended])

    def compute(self, ops: Backend, variant: int) -> Tensor:
        """[queries, Hq, D]."""
        keys, values = self._caches(variant)
        query_start_loc, slot_start_loc = self.bounds
        slots = self.slots[variant]
        return ops.sparse_attention(
            self.queries,
            as_rows(keys),
            as_rows(values),
            query_start_loc,
            slots,
            slot_start_loc,
            self.cos,
            self.sin,
            self.shape.scale,
        )

    def baselines(self) -> dict[str, Call]:
        """The reference is gather, rotation and explicit products; this one has torch's fused attention."""
        return {"torch gather + rotate + SDPA": self._sdpa}

    def _sdpa(self, variant: int) -> Tensor:
        keys, values = (as_rows(cache) for cache in self._caches(variant))
        slots, own = self.slots[variant], len(self.queries)
        cos, sin = (part.to(keys.dtype) for part in (self.cos, self.sin))
        k = rotate(gather_rows(keys, slots), cos, sin)[None]
        v = gather_rows(values, slots)[None]
        q = rotate(self.queries.transpose(0, 1), cos[-own:], sin[-own:])[None]
        if own == 1:  # the heads of a group as queries of one head: several times faster than `enable_gqa`
            q = q.view(1, self.shape.num_kv_heads, -1, self.shape.head_dim)
            return _attend(q, k, v).view(1, -1, self.shape.head_dim)
        seen = torch.ones(own, k.shape[2], dtype=torch.bool).tril(k.shape[2] - own)
        return _attend(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)

    def _caches(self, variant: int) -> tuple[Tensor, Tensor]:
        copy = variant % len(self.pools[0])
        return self.pools[0][copy], self.pools[1][copy]

    def difference(self, result: Any, expected: Any) -> str | None:
        """Outputs must be close, next to their size."""
        error = relative_error(result, expected)
        return None if error <= _TOLERANCE else f"relative error of the output {error:.3g}, allowed {_TOLERANCE}"


def cases(name: str, length: int, queries: list[int]) -> Iterator[Attention]:
    """Those of one shape and length."""
    for number in queries:
        yield Attention(name, length, number)


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


def _slots(length: int, queries: int) -> Tensor:
    """Ascending rows: the first, some of the middle, and the last ones."""
    recent = length - _LOCAL - (queries if queries > 1 else 0)
    chosen = torch.randperm(recent - _SINKS)[:_SELECTED].sort().values + _SINKS
    return torch.cat((torch.arange(_SINKS), chosen, torch.arange(recent, length)))
