"""One forward pass: which queries attend what, worked out once and followed by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenselect.cache import RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.hardware import half_is_slow
from tokenselect.ops import Backend
from tokenselect.ops.reference import causal_attention, rotate
from tokenselect.rotary import RotaryTable
from tokenselect.selection import Block, SelectionPlan, block_starts, plan_selection, select_tokens


@dataclass(frozen=True, slots=True)
class Extras:
    """What some models add to attention: a soft cap of the logits (Gemma 2), a sink logit per head (gpt-oss)."""

    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.softcap is not None or self.sink_logits is not None


@dataclass(frozen=True, slots=True)
class DensePass:
    """Every query attends all earlier tokens: re-indexed positions are the true ones, so rotated keys are kept.

    Attributes:
        cos: [1 or B, 1, length, rotary_dim / 2] in the model's dtype.
        sin: like `cos`.
        table: the rotations they come from.
        mask: [B, 1, Tq, T] bool, True where attended; None: causal without padding.
    """

    cos: Tensor
    sin: Tensor
    table: RotaryTable
    mask: Tensor | None

    def attend(self, layer: RawKeyLayer, query: Tensor, scale: float, extras: Extras) -> Tensor:
        """Attention of `query` [B, Hq, Tq, D] over the layer's cache; returns [B, Tq, Hq, D]."""
        keys = layer.rotated_keys(self.cos, self.sin, self.table.interleaved, self.table)
        values, own, total = layer.values, query.shape[2], keys.shape[2]
        assert values is not None
        now = slice(total - own, total)
        query = rotate(query, self.cos[:, :, now], self.sin[:, :, now], self.table.interleaved)
        if own == 1 and not extras.any:
            out = _attend_packed(query, keys, values, scale, self.mask)
        elif extras.any or _slow_in_sdpa(query):
            out = torch.stack([self._attend_row(row, query * scale, keys, values, extras) for row in range(len(query))])
        else:
            causal = self.mask is None
            out = scaled_dot_product_attention(
                query, keys, values, self.mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2).contiguous()

    def _attend_row(self, row: int, query: Tensor, keys: Tensor, values: Tensor, extras: Extras) -> Tensor:
        """One sequence of the batch, some queries at a time so that the logits stay small."""
        padding = 0 if self.mask is None else int((~self.mask[row, 0, -1]).sum())
        past, out = keys.shape[2] - query.shape[2], torch.zeros_like(query[row])
        for start in range(max(0, padding - past), query.shape[2], _QUERIES_AT_ONCE):
            part = slice(start, min(start + _QUERIES_AT_ONCE, query.shape[2]))
            seen = slice(padding, past + part.stop)
            out[:, part] = causal_attention(
                query[row, :, part],
                keys[row, :, seen],
                values[row, :, seen],
                softcap=extras.softcap,
                sink_logits=extras.sink_logits,
            )
        return out


_QUERIES_AT_ONCE = 512


def _slow_in_sdpa(query: Tensor) -> bool:
    """In half precision on a CPU that is made for it, matrix products are 2.5 times faster (docs/experiments.md)."""
    return query.device.type == "cpu" and query.dtype != torch.float32 and not half_is_slow(query.device)


def _attend_packed(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """One query: the heads of a group are the rows of one small matrix, so keys are not repeated for them."""
    batch, heads, _, dim = query.shape
    packed = query.view(batch, keys.shape[1], -1, dim)
    return scaled_dot_product_attention(packed, keys, values, mask, scale=scale).view(batch, heads, 1, dim)


@dataclass(frozen=True, slots=True)
class SparsePass:
    """At least one query selects.

    Attributes:
        blocks: all blocks, in the order of their queries.
        plan: those that select, and `selecting`, their places in `blocks`; the others attend all earlier tokens.
        padding: rows before each sequence's first token.
        rows: [real queries] int64 into the [B * Tq] queries; None: there is no padding among them.
    """

    blocks: Sequence[Block]
    plan: SelectionPlan
    selecting: Sequence[int]
    padding: list[int]
    rows: Tensor | None
    query_start_loc: Tensor
    cos: Tensor
    sin: Tensor
    config: TokenSelectConfig
    ops: Backend

    def attend(self, layer: RawKeyLayer, query: Tensor, scale: float, extras: Extras) -> Tensor:
        """Attention of `query` [B, Hq, Tq, D] over the layer's cache; returns [B, Tq, Hq, D]."""
        layer.rotated = None
        batch, heads, own, dim = query.shape
        flat = query.transpose(1, 2).reshape(batch * own, heads, dim)
        real = flat if self.rows is None else flat[self.rows]
        keys, values = layer.rows()
        slots = self._slots(layer, real, keys, scale)
        lengths = [part.shape[0] for part in slots]
        out = self.ops.sparse_attention(
            real,
            keys,
            values,
            self.query_start_loc,
            torch.cat(slots),
            torch.tensor([0, *accumulate(lengths)]),
            self.cos,
            self.sin,
            scale,
            interleaved=self.plan.table.interleaved,
            softcap=extras.softcap,
            sink_logits=extras.sink_logits,
        )
        if self.rows is not None:
            out = torch.zeros_like(flat).index_copy_(0, self.rows, out)
        return out.view(batch, own, heads, dim)

    def _slots(self, layer: RawKeyLayer, queries: Tensor, keys: Tensor, scale: float) -> list[Tensor]:
        """Rows of the cache that each block attends."""
        pages = layer.page_table(self.padding)
        chosen = select_tokens(queries, keys, pages, self.plan, layer.states, self.config, self.ops, scale)
        positions = dict(zip(self.selecting, chosen, strict=True))
        return [
            pages.slots(
                block.sequence,
                positions[i] if i in positions else torch.arange(block.end, device=keys.device),
            )
            for i, block in enumerate(self.blocks)
        ]


def plan_pass(
    config: TokenSelectConfig,
    ops: Backend,
    table: RotaryTable,
    max_distance: int,
    dtype: torch.dtype,
    padding: list[int],
    past: int,
    length: int,
    tail_start: int,
    known_length: int,
) -> DensePass | SparsePass:
    """Work out one forward pass over a batch of sequences.

    Args:
        config: the settings.
        ops: the backend.
        table: rotations of the model.
        max_distance: largest distance for scoring.
        dtype: of queries and keys.
        padding: left padding of each sequence, in tokens.
        past: tokens cached before, padding included.
        length: tokens of this pass, padding included.
        tail_start: from there on, padding included, every prompt token selects for itself.
        known_length: tokens that the context is known to have, padding included: those of the whole prompt.
    """
    blocks = _blocks(config, padding, past, length, tail_start)
    selecting = [
        i for i, block in enumerate(blocks) if not config.covers(known_length - padding[block.sequence], block.start)
    ]
    if not selecting:
        return _dense_pass(table, dtype, padding, past, length)
    lengths = [block.end - block.start for block in blocks]
    longest = max(config.num_attended(known_length - pad) for pad in padding)
    cos, sin = table.rotation(slice(longest), torch.float32)
    return SparsePass(
        blocks,
        plan_selection([blocks[i] for i in selecting], config, table, max_distance),
        selecting,
        padding,
        _real_rows(padding, past, length, cos.device),
        torch.tensor([0, *accumulate(lengths)]),
        cos,
        sin,
        config,
        ops,
    )


def _blocks(config: TokenSelectConfig, padding: list[int], past: int, length: int, tail_start: int) -> list[Block]:
    blocks: list[Block] = []
    row = 0
    for sequence, pad in enumerate(padding):
        start, end = max(0, past - pad), past + length - pad
        if end <= start:
            continue
        starts = block_starts(start, end, tail_start - pad, config.block_size)
        for first, last in zip(starts, [*starts[1:], end], strict=True):
            blocks.append(Block(sequence, first, last, row))
            row += last - first
    return blocks


def _real_rows(padding: list[int], past: int, length: int, device: torch.device) -> Tensor | None:
    if max(padding) <= past:
        return None
    own = torch.arange(length, device=device)
    return torch.cat([own[max(0, pad - past) :] + row * length for row, pad in enumerate(padding)])


def _dense_pass(table: RotaryTable, dtype: torch.dtype, padding: list[int], past: int, length: int) -> DensePass:
    total = past + length
    if not any(padding):
        cos, sin = table.rotation(slice(0, total), dtype)
        mask = None if past == 0 or length == 1 else _causal(past, length, cos.device)[None, None]
        return DensePass(cos[None, None], sin[None, None], table, mask)
    pads = torch.tensor(padding, device=table.cos.device)[:, None]
    positions = (torch.arange(total, device=pads.device) - pads).clamp(min=0)  # [B, T]
    cos, sin = table.rotation(positions, dtype)
    real = torch.arange(total, device=pads.device) >= pads  # [B, T]
    causal = _causal(past, length, pads.device)
    # A padding query attends itself: a row without any key would be NaN.
    own = torch.arange(total, device=pads.device) == torch.arange(past, total, device=pads.device)[:, None]
    mask = (causal & real[:, None, None]) | own
    return DensePass(cos[:, None], sin[:, None], table, mask)


def _causal(past: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(past + length, device=device) <= torch.arange(past, past + length, device=device)[:, None]
