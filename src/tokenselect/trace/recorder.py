"""Who is told, layer by layer, what was selected while an answer is written. Nothing of this runs without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.ops import reference
from tokenselect.ops.explain import attention_mass, votes_by_head
from tokenselect.ops.paging import PageTable
from tokenselect.rotary import RotaryTable
from tokenselect.selection import SelectionPlan, SelectionState, vote_scale

_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Selected:
    """What one layer selected in one forward pass, and from what: the arguments and result of `select_tokens`.

    Attributes:
        queries, keys, pages, plan, states, config, scale, key_scales, key_center: as `select_tokens` took them.
        raw_keys: [num_rows, num_kv_heads, head_dim], no int8 copy.
        attended: what it returned.
        raw_pages: where tokens lie in `raw_keys`; None: as in `keys`.
    """

    queries: Tensor
    keys: Tensor
    pages: PageTable
    plan: SelectionPlan
    states: Sequence[SelectionState]
    config: TokenSelectConfig
    scale: float
    raw_keys: Tensor
    attended: Sequence[Tensor]
    key_scales: Tensor | None = None
    key_center: Tensor | None = None
    raw_pages: PageTable | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer's selection for one query.

    Attributes:
        indices: [k] int32, positions chosen by vote, ascending.
        votes: [k] float16, the query's own votes for them, also where an earlier selection was reused, before they
            count less by age; all candidates' votes sum to 1.
        head_shares: [k, num_q_heads] uint8, each head's part in a token's vote, in 255ths.
        window_start: where the local window begins, which ends with the query.
        served: whether the Selection Cache served it; None: it was not asked.
        mass: share of dense attention that falls on what is attended; NaN beyond the trained window.
    """

    indices: NDArray[np.int32]
    votes: NDArray[np.float16]
    head_shares: NDArray[np.uint8]
    window_start: int
    served: bool | None
    mass: float

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.indices.nbytes + self.votes.nbytes + self.head_shares.nbytes


@dataclass(slots=True)
class Recorder:
    """Keeps what one sequence selects from some position on; what would be too large is counted, not kept.

    Attributes:
        trained_window: within it the share of dense attention is worked out too.
        max_bytes: a query is kept if it finds less than that.
        sequence: place of the sequence in the batch; a host that reorders its batch says so before each pass.
        first: position of the first query to be recorded.
        cells: what was recorded, by position of the query and by layer.
        dropped: positions that were not kept.
    """

    trained_window: int = 0
    max_bytes: int = _MAX_BYTES
    sequence: int = 0
    first: int = 0
    cells: dict[int, dict[int, Cell]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    _bytes: int = 0

    def begin(self, first: int) -> None:
        """Forget everything; record from the query at position `first` on."""
        self.first, self._bytes = first, 0
        self.cells, self.dropped = {}, set()

    @torch.no_grad()
    def record(self, layer: int, selected: Selected) -> None:
        """Keep what a layer selected for the queries that are wanted."""
        for row, block in enumerate(selected.plan.blocks):
            if block.sequence == self.sequence and block.end > self.first and self._has_room(block.end - 1):
                cell = _cell(selected, row, self.trained_window)
                self.cells.setdefault(block.end - 1, {})[layer] = cell
                self._bytes += cell.nbytes

    def _has_room(self, position: int) -> bool:
        """A query that was begun is kept whole."""
        if position not in self.cells and self._bytes >= self.max_bytes:
            self.dropped.add(position)
        return position not in self.dropped


def _cell(selected: Selected, row: int, trained_window: int) -> Cell:
    plan, config = selected.plan.take([row]), selected.config
    state = selected.states[plan.blocks[0].sequence]
    indices = state.indices if config.num_selected_tokens else None
    if indices is None:
        indices = torch.zeros(0, dtype=torch.int64, device=selected.keys.device)
    by_head = _votes(selected, plan, indices) / max(1, len(plan.distances))
    votes = by_head.sum(1)
    shares = by_head / votes.clamp(min=torch.finfo(votes.dtype).tiny)[:, None]
    return Cell(
        _to_numpy(indices, np.int32),
        _to_numpy(votes, np.float16),
        _to_numpy((shares * 255).round(), np.uint8),
        state.window_start,
        state.served,
        _mass(selected, plan, selected.attended[row], trained_window),
    )


def _votes(selected: Selected, plan: SelectionPlan, indices: Tensor) -> Tensor:
    table = plan.table
    pooled = reference.pool_queries(selected.queries, plan.starts, plan.counts, table.cos, table.sin, table.interleaved)
    return votes_by_head(
        pooled,
        selected.keys,
        selected.pages,
        plan.blocks[0].sequence,
        plan.candidates,
        plan.distances,
        vote_scale(selected.scale, table, selected.config),
        indices,
        plan.context,
        selected.key_scales,
        selected.key_center,
    )


def _mass(selected: Selected, plan: SelectionPlan, attended: Tensor, trained_window: int) -> float:
    block, table = plan.blocks[0], plan.table
    if block.end > trained_window:
        return float("nan")
    cos, sin = _true_rotation(table, block.end)
    return attention_mass(
        selected.queries[block.queries.stop - 1],
        selected.raw_keys,
        selected.raw_pages or selected.pages,
        block.sequence,
        attended,
        cos,
        sin,
        selected.scale,
        table.interleaved,
    )


def _true_rotation(table: RotaryTable, length: int) -> tuple[Tensor, Tensor]:
    """Rotations by the true positions, which may be more than the table of re-indexed ones has."""
    angle = torch.arange(length, device=table.cos.device)[:, None] * table.frequencies
    factor = table.attention_factor
    return (angle.cos() * factor).float(), (angle.sin() * factor).float()


def _to_numpy(tensor: Tensor, dtype: type[Any]) -> NDArray[Any]:
    return tensor.cpu().numpy().astype(dtype)
