"""One forward pass over vLLM's ragged batch: worked out once, followed by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.ragged import Stretch, attended_ranges, cut_blocks, range_bounds
from tokenselect.integrations.vllm.requests import RequestState
from tokenselect.integrations.vllm.tally import Tally
from tokenselect.ops import Backend
from tokenselect.ops.paging import PageTable
from tokenselect.rotary import RotaryTable
from tokenselect.selection import (
    Block,
    Reduce,
    SelectionPlan,
    choose_tokens,
    plan_selection,
    select_tokens,
)
from tokenselect.trace.recorder import Recorder, Selected


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a layer scores.

    Attributes:
        raw_keys: [num_rows, num_kv_heads, head_dim], by the step's pages.
        keys: the same, or an int8 copy, which has
        pages: of its own.
        scales: [num_rows, num_kv_heads], of a copy.
        center: [num_seqs, num_kv_heads, head_dim], of a copy.
    """

    raw_keys: Tensor
    keys: Tensor
    pages: PageTable
    scales: Tensor | None = None
    center: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The blocks that select by the same settings."""

    config: TokenSelectConfig
    plan: SelectionPlan
    places: list[int]  # of its blocks among all
    holes: Tensor  # [num_blocks] int64, where in the step's slots the chosen tokens of each begin


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer does in one forward pass.

    Attributes:
        num_tokens: real queries; rows after them are padding.
        blocks: all blocks, in the order of their queries.
        query_start_loc: [num_blocks + 1] int64.
        pages: where each sequence's tokens lie.
        slots: [sum of attended] int64, rows of the cache that the blocks attend, with holes for what is chosen.
        slot_start_loc: [num_blocks + 1] int64.
        selections: who selects, and by which settings; nobody: every block attends all earlier tokens.
        states: of the requests, in the batch's order.
        tally: where layers note what they select.
        recorders: of the requests that are traced.
    """

    num_tokens: int
    blocks: Sequence[Block]
    query_start_loc: Tensor
    pages: PageTable
    slots: Tensor
    slot_start_loc: Tensor
    selections: Sequence[Selection]
    states: Sequence[RequestState]
    table: RotaryTable
    cos: Tensor
    sin: Tensor
    ops: Backend
    tally: Tally
    recorders: Sequence[Recorder]

    def attended(
        self, layer: str, queries: Tensor, scoring: Scoring | None, scale: float, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the cache that the blocks attend in a layer, one block after the other, and where each begins."""
        if not self.selections or scoring is None:
            return self.slots, self.slot_start_loc
        with self.tally.timed(queries.device):
            if self.recorders or any(selection.config.reuse for selection in self.selections):
                return self._by_state(layer, queries, scoring, scale, reduce)
            return self._afresh(queries, scoring, scale, reduce), self.slot_start_loc

    def _afresh(self, queries: Tensor, scoring: Scoring, scale: float, reduce: Reduce | None) -> Tensor:
        slots = self.slots.clone()
        for part in self.selections:
            if not part.config.num_selected_tokens:
                continue
            given = queries, scoring.keys, scoring.pages, part.plan, part.config, self.ops, scale
            chosen = choose_tokens(*given, scoring.scales, scoring.center, reduce)
            self.ops.fill_slots(chosen, part.plan.sequences, self.pages, part.holes, slots)
        return slots

    def _by_state(
        self, layer: str, queries: Tensor, scoring: Scoring, scale: float, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """The same by what requests remember: the Selection Cache, by which a block's window varies, and traces."""
        bounds = self.slot_start_loc.tolist()
        parts = [self.slots[bounds[i] : bounds[i + 1]] for i in range(len(self.blocks))]
        states = [state.layers[layer] for state in self.states]
        for part in self.selections:
            given = queries, scoring.keys, scoring.pages, part.plan, states, part.config, self.ops, scale
            chosen = select_tokens(*given, scoring.scales, scoring.center, reduce)
            if self.recorders:
                facts = part.plan, states, part.config, scale, scoring.raw_keys, chosen, scoring.scales, scoring.center
                done = Selected(queries, scoring.keys, scoring.pages, *facts, raw_pages=self.pages)
                for recorder in self.recorders:
                    recorder.record(extract_layer_index(layer), done)
            if part.config.num_selected_tokens:
                asked = [block for block, may in zip(part.plan.blocks, part.plan.may_reuse, strict=True) if may]
                self.tally.lookups += len(asked)
                self.tally.hits += sum(bool(states[block.sequence].served) for block in asked)
            for place, positions in zip(part.places, chosen, strict=True):
                parts[place] = self.pages.slots(self.blocks[place].sequence, positions)
        slots = torch.cat(parts)
        self.tally.further += slots.shape[0] - self.slots.shape[0]
        return slots, torch.tensor([0, *accumulate(part.shape[0] for part in parts)])


def plan_step(
    stretches: Sequence[Stretch],
    states: Sequence[RequestState],
    pages: PageTable,
    table: RotaryTable,
    rotation: tuple[Tensor, Tensor],
    max_distance: int,
    ops: Backend,
    tally: Tally,
) -> Step:
    """Work out one forward pass.

    Args:
        stretches: the tokens of each sequence that go through the model now.
        states: of their requests.
        pages: where each sequence's tokens lie.
        table: rotations of the model.
        rotation: its cosines and sines, attention factor included.
        max_distance: largest distance for scoring.
        ops: the backend.
        tally: where layers note what they select.
    """
    first_queries = [0, *accumulate(stretch.end - stretch.start for stretch in stretches)]
    blocks: list[Block] = []
    selecting: dict[TokenSelectConfig, list[int]] = {}
    for sequence, (stretch, state) in enumerate(zip(stretches, states, strict=True)):
        for block in cut_blocks(sequence, stretch, first_queries[sequence], state.config):
            if not stretch.covers(state.config, block):
                selecting.setdefault(state.config, []).append(len(blocks))
            blocks.append(block)
    settings = {place: config for config, places in selecting.items() for place in places}
    ranges = [attended_ranges(block, settings.get(i)) for i, block in enumerate(blocks)]
    start_loc = torch.tensor(range_bounds(ranges))
    return Step(
        first_queries[-1],
        blocks,
        torch.tensor([0, *accumulate(block.end - block.start for block in blocks)]),
        pages,
        ops.range_slots(list(chain.from_iterable(ranges)), pages),
        start_loc,
        [
            _selection(config, [blocks[place] for place in places], places, start_loc, table, max_distance)
            for config, places in selecting.items()
        ],
        states,
        table,
        *rotation,
        ops,
        tally,
        _recorders(states),
    )


def _recorders(states: Sequence[RequestState]) -> list[Recorder]:
    """Those of the traced requests, which are told their places in this batch."""
    recorders = []
    for place, state in enumerate(states):
        if state.trace is not None:
            state.trace.recorder.sequence = place
            recorders.append(state.trace.recorder)
    return recorders


def _selection(
    config: TokenSelectConfig,
    blocks: list[Block],
    places: list[int],
    start_loc: Tensor,
    table: RotaryTable,
    max_distance: int,
) -> Selection:
    device = table.cos.device
    holes = start_loc[torch.tensor(places)].to(device) + config.num_sink_tokens
    return Selection(config, plan_selection(blocks, config, table, max_distance), places, holes)
