"""One forward pass: which queries attend what, worked out once and followed by every layer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from tokenselect.cache import RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.ragged import Stretch, attended_ranges, cut_blocks, range_bounds
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.rotary import RotaryTable
from tokenselect.selection import (
    Block,
    Select,
    SelectionPlan,
    candidates_end,
    choose_tokens,
    plan_selection,
    select_tokens,
)
from tokenselect.trace.recorder import Recorder, Selected


@dataclass(frozen=True, slots=True)
class Pass:
    """What every layer does in one forward pass.

    Attributes:
        blocks: all blocks, in the order of their queries.
        plan: of those that select, and `selecting`, their places in `blocks`; the others attend all earlier tokens.
        padding: rows before each sequence's first token.
        rows: [real queries] int64 into the [B * Tq] queries; None: there is no padding among them.
        select: `select_tokens`, or another method's.
        recorder: who is told what was selected; None: nobody.
    """

    blocks: Sequence[Block]
    plan: SelectionPlan | None
    selecting: Sequence[int]
    padding: list[int]
    rows: Tensor | None
    query_start_loc: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool
    config: TokenSelectConfig
    ops: Backend
    select: Select = select_tokens
    recorder: Recorder | None = None
    _whole: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by page size: layers share it
    _holes: dict[int, tuple[Tensor, Tensor, Tensor, list[int]]] = field(default_factory=dict)  # the same

    def end(self) -> None:
        """Called when the pass is over: it holds nothing."""

    def attend(
        self, layer: RawKeyLayer, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of `query` [B, Hq, Tq, D] over the layer's cache; returns [B, Tq, Hq, D].

        Some models add a soft cap of the logits (Gemma 2) or `sinks`, a learned logit per head (gpt-oss).
        """
        batch, heads, own, dim = query.shape
        flat = query.transpose(1, 2).reshape(batch * own, heads, dim)
        real = flat if self.rows is None else flat[self.rows]
        slots, slot_start_loc = self._slots(layer, real, scale)
        extras = {"interleaved": self.interleaved, "softcap": softcap, "sink_logits": sinks}
        if slots.shape[0] <= layer.most_rows:
            starts = self.query_start_loc, slot_start_loc
            out = self._attend_blocks(layer, real, slots, *starts, scale, extras)
        else:
            groups = _groups(self.query_start_loc, slot_start_loc, layer.most_rows)
            parts = [
                self._attend_blocks(layer, real[q[0] : q[-1]], slots[s[0] : s[-1]], q - q[0], s - s[0], scale, extras)
                for q, s in groups
            ]
            out = torch.cat(parts)
        if self.rows is not None:
            out = flat.new_zeros(flat.shape).index_copy_(0, self.rows, out)
        return out.view(batch, own, heads, dim)

    def _attend_blocks(
        self,
        layer: RawKeyLayer,
        queries: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        slot_start_loc: Tensor,
        scale: float,
        extras: dict[str, Any],
    ) -> Tensor:
        keys, values, rows = layer.attended_rows(slots)
        starts = query_start_loc, rows, slot_start_loc
        return self.ops.sparse_attention(queries, keys, values, *starts, self.cos, self.sin, scale, **extras)

    def _slots(self, layer: RawKeyLayer, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Rows of the cache that the blocks attend, one block after the other, and where each block's begin."""
        pages = layer.page_table(self.padding)
        if self.plan is None:
            if pages.page_size not in self._whole:
                self._whole[pages.page_size] = self._rows_of(pages, {}, queries.device)
            return self._whole[pages.page_size]
        keys, *copy = layer.scoring_rows(self.padding)
        if self._is_plain():
            return self._chosen_slots(layer, queries, keys, copy, scale)
        chosen = self.select(queries, keys, pages, self.plan, layer.states, self.config, self.ops, scale, *copy)
        if self.recorder is not None:
            raw = layer.raw_rows()
            done = Selected(queries, keys, pages, self.plan, layer.states, self.config, scale, raw, chosen, *copy)
            self.recorder.record(layer.index, done)
        return self._rows_of(pages, dict(zip(self.selecting, chosen, strict=True)), queries.device)

    def _is_plain(self) -> bool:
        """Whether all blocks select anew and nobody asks for their positions: their rows are written at once."""
        is_alone = self.select is select_tokens and self.recorder is None and not self.config.reuse
        return is_alone and self.config.num_selected_tokens > 0 and len(self.selecting) == len(self.blocks)

    def _chosen_slots(
        self, layer: RawKeyLayer, queries: Tensor, keys: Tensor, copy: list[Tensor | None], scale: float
    ) -> tuple[Tensor, Tensor]:
        """What `select` and `_rows_of` find, in as few launches as there can be."""
        config, pages = self.config, layer.page_table(self.padding)
        assert self.plan is not None
        chosen = choose_tokens(queries, keys, pages, self.plan, config, self.ops, scale, copy[0], copy[1])
        if hasattr(self.ops, "attended_slots"):
            sinks, windows = config.num_sink_tokens, [candidates_end(block, config) for block in self.blocks]
            sequences, ends = [block.sequence for block in self.blocks], [block.end for block in self.blocks]
            slots, bounds = self.ops.attended_slots(chosen - sinks, pages, sequences, windows, ends, sinks)
            start_loc = torch.tensor(bounds)
        else:
            slots, places, start_loc, bounds = self._with_holes(pages)
            self.ops.fill_slots(chosen, self.plan.sequences, pages, places, slots)
        for block, first, last in zip(self.blocks, bounds, bounds[1:], strict=False):
            layer.states[block.sequence].count(block.end - block.start, last - first, block.end)
        return slots, start_loc

    def _with_holes(self, pages: PageTable) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """What all layers attend, with holes for what each chooses: layers write into the same one after the other.

        Returns:
            The rows; where each block's hole begins; where its rows begin, as a tensor and as a list.
        """
        if pages.page_size not in self._holes:
            ranges = [attended_ranges(block, self.config) for block in self.blocks]
            bounds = range_bounds(ranges)
            rows, start_loc = self.ops.range_slots(list(chain.from_iterable(ranges)), pages), torch.tensor(bounds)
            self._holes[pages.page_size] = rows, start_loc[:-1] + self.config.num_sink_tokens, start_loc, bounds
        return self._holes[pages.page_size]

    def _rows_of(self, pages: PageTable, selected: dict[int, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        rows = [
            pages.slots(block.sequence, selected[i] if i in selected else torch.arange(block.end, device=device))
            for i, block in enumerate(self.blocks)
        ]
        start_loc = torch.tensor([0, *accumulate(part.shape[0] for part in rows)])
        return rows[0] if len(rows) == 1 else torch.cat(rows), start_loc


def _groups(query_start_loc: Tensor, slot_start_loc: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Where queries and slots begin in groups of blocks that attend at most so many rows, and where the last end."""
    starts = slot_start_loc.tolist()
    first = 0
    while first < len(starts) - 1:
        last = bisect_right(starts, starts[first] + most) - 1
        assert last > first, "a block attends more than there is room for"
        yield query_start_loc[first : last + 1], slot_start_loc[first : last + 1]
        first = last


def plan_pass(
    config: TokenSelectConfig,
    ops: Backend,
    table: RotaryTable,
    max_distance: int,
    padding: list[int],
    past: int,
    length: int,
    tail_start: int,
    known_length: int,
    select: Select = select_tokens,
    recorder: Recorder | None = None,
) -> Pass:
    """Work out one forward pass over a batch of sequences.

    Args:
        config: the settings.
        ops: the backend.
        table: rotations of the model.
        max_distance: largest distance for scoring.
        padding: left padding of each sequence, in tokens.
        past: tokens cached before, padding included.
        length: tokens of this pass, padding included.
        tail_start: from there on, padding included, every prompt token selects for itself.
        known_length: tokens that the context is known to have, padding included: those of the whole prompt.
        select: `select_tokens`, or another method's.
        recorder: who is told what was selected.
    """
    stretches = [
        Stretch(max(0, past - pad), max(0, past + length - pad), tail_start - pad, known_length - pad)
        for pad in padding
    ]
    blocks = _blocks(config, stretches)
    selecting = [i for i, block in enumerate(blocks) if not stretches[block.sequence].covers(config, block)]
    lengths = [block.end - block.start for block in blocks]
    longest = max(config.num_attended(known_length - pad) for pad in padding)
    cos, sin = table.rotation(slice(longest), torch.float32)
    plan = plan_selection([blocks[i] for i in selecting], config, table, max_distance) if selecting else None
    return Pass(
        blocks,
        plan,
        selecting,
        padding,
        _real_rows(padding, past, length, cos.device),
        torch.tensor([0, *accumulate(lengths)]),
        cos,
        sin,
        table.interleaved,
        config,
        ops,
        select,
        recorder,
    )


def _blocks(config: TokenSelectConfig, stretches: list[Stretch]) -> list[Block]:
    """The blocks of all sequences."""
    blocks: list[Block] = []
    row = 0
    for sequence, stretch in enumerate(stretches):
        if stretch.end > stretch.start:
            blocks += cut_blocks(sequence, stretch, row, config)
        row += stretch.end - stretch.start
    return blocks


def _real_rows(padding: list[int], past: int, length: int, device: torch.device) -> Tensor | None:
    if max(padding) <= past:
        return None
    own = torch.arange(length, device=device)
    return torch.cat([own[max(0, pad - past) :] + row * length for row, pad in enumerate(padding)])
