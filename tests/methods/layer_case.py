"""One layer with random keys, and what methods choose there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.ops import reference
from tokenselect.ops.paging import PageTable
from tokenselect.rotary import RotaryTable
from tokenselect.selection import Block, SelectionPlan, SelectionState, plan_selection, select_tokens

if TYPE_CHECKING:
    from tokenselect.methods.selecting import Choice

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 16, 0.3
SMALL = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=8,
    num_selected_tokens=32,
    num_dense_tokens=0,
    block_size=8,
    num_tail_tokens=0,
)


def table() -> RotaryTable:
    angle = torch.arange(64)[:, None] * 30.0 ** -(torch.arange(DIM // 2).double() / (DIM // 2))
    return RotaryTable(angle.cos().float(), angle.sin().float(), False, 1.0)


@dataclass
class Layer:
    """A sequence of random keys under a method."""

    method: Choice
    asked: TokenSelectConfig = SMALL
    length: int = 400
    states: list[SelectionState] = field(default_factory=lambda: [SelectionState()])

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.keys = torch.randn(self.length, KV_HEADS, DIM, generator=generator)
        self.queries = torch.randn(self.length, HEADS, DIM, generator=generator)
        self.pages = PageTable(torch.zeros(1, 1, dtype=torch.int64), self.length, [0])
        self.config = self.method.settings(self.asked)
        around = self.method.around
        self.ops = around(reference) if around else reference  # type: ignore[arg-type]
        self.table = table()

    def plan(self, *blocks: Block) -> SelectionPlan:
        return plan_selection(blocks, self.config, self.table, 300)

    def select(self, *spans: tuple[int, int]) -> list[list[int]]:
        """What the blocks `start .. end - 1`, one after the other in one pass, attend."""
        rows = [0]
        for start, end in spans:
            rows.append(rows[-1] + end - start)
        blocks = [Block(0, start, end, row) for (start, end), row in zip(spans, rows, strict=False)]
        queries = torch.cat([self.queries[start:end] for start, end in spans])
        select = self.method.select or select_tokens
        arguments = (queries, self.keys, self.pages, self.plan(*blocks), self.states, self.config, self.ops, SCALE)
        return [positions.tolist() for positions in select(*arguments)]


def middle(attended: list[int], start: int, config: TokenSelectConfig = SMALL) -> list[int]:
    """What was chosen, between sinks and the local window of a block that begins at `start`."""
    window = start - config.num_local_tokens
    assert attended[: config.num_sink_tokens] == list(range(config.num_sink_tokens))
    return [token for token in attended if config.num_sink_tokens <= token < window]


def rotated(x: Tensor, position: float) -> Tensor:
    """`x` [D] turned to a position, pair by pair."""
    angle = position * 30.0 ** -(torch.arange(DIM // 2).double() / (DIM // 2))
    a, b = x.double().chunk(2)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
