"""A trace: one answer, the text that was read for it, and what every layer selected for every token written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenselect.trace.recorder import Cell, Recorder


@dataclass(frozen=True, slots=True)
class Trace:
    """What was read while an answer was written.

    A *step* is a token that was written; the query that selects for step `s` is the token before it, at position
    `num_prompt_tokens - 1 + s`. A *cell* is a step and a layer: cell `s * num_layers + l`. Its selection is empty where
    the layer attended everything.

    Attributes:
        facts: model, method, trained_window, config and what else names the run; values of JSON.
        text: all tokens as text, prompt and answer.
        starts: [num_tokens] int32, ascending: token `i` is `text[starts[i]:starts[i + 1]]`.
        num_prompt_tokens: tokens of the prompt; the others are the answer's.
        layers: [num_layers] int32, the layers that select.
        start_loc: [num_steps * num_layers + 1] int64, where each cell's selection begins.
        indices: [sum of selected] int32, positions, ascending within a cell.
        votes: [sum of selected] float16, before they count less by age: those of all candidates of a cell sum to 1.
        head_shares: [sum of selected, num_q_heads] uint8, each head's part in the vote, in 255ths.
        windows: [num_steps, num_layers] int32, where the local window begins; 0: everything was attended.
        served: [num_steps, num_layers] int8: 1, the Selection Cache served the step; 0, it did not; -1, not asked.
        mass: [num_steps, num_layers] float32, share of dense attention on what was attended; NaN: not known.
    """

    facts: Mapping[str, Any]
    text: str
    starts: NDArray[np.int32]
    num_prompt_tokens: int
    layers: NDArray[np.int32]
    start_loc: NDArray[np.int64]
    indices: NDArray[np.int32]
    votes: NDArray[np.float16]
    head_shares: NDArray[np.uint8]
    windows: NDArray[np.int32]
    served: NDArray[np.int8]
    mass: NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.starts)

    @property
    def num_steps(self) -> int:
        """Tokens written whose selection was kept."""
        return len(self.windows)

    @property
    def num_layers(self) -> int:
        """Layers that select."""
        return len(self.layers)

    @property
    def num_sinks(self) -> int:
        """First tokens, always attended."""
        return int(self.facts["config"]["num_sink_tokens"])

    @property
    def answer(self) -> str:
        """What was written."""
        return self.text_of(self.num_prompt_tokens, self.num_tokens)

    def text_of(self, start: int, end: int) -> str:
        """The text of the tokens `start .. end - 1`."""
        return self.text[self._begin(start) : self._begin(end)]

    def _begin(self, token: int) -> int:
        return int(self.starts[token]) if token < self.num_tokens else len(self.text)

    def cell(self, step: int, layer: int) -> slice:
        """Where the selection of a cell lies; `layer` counts those that select."""
        at = step * self.num_layers + layer
        return slice(int(self.start_loc[at]), int(self.start_loc[at + 1]))

    def available(self) -> NDArray[np.int64]:
        """[num_steps] tokens that there were to attend, the query included."""
        return self.num_prompt_tokens + np.arange(self.num_steps)

    def attended(self) -> NDArray[np.int64]:
        """[num_steps, num_layers] tokens that were attended: sinks, selected and local ones."""
        selected = np.diff(self.start_loc).reshape(self.windows.shape)
        sinks = np.minimum(self.num_sinks, self.windows)
        return sinks + selected + self.available()[:, None] - self.windows

    def cells_of(self) -> NDArray[np.int64]:
        """[sum of selected] the cell that each selected token belongs to."""
        return np.repeat(np.arange(len(self.start_loc) - 1), np.diff(self.start_loc))


def make_trace(recorder: Recorder, facts: Mapping[str, Any], text: str, starts: list[int], prompt: int) -> Trace:
    """Put together what a recorder kept.

    Args:
        recorder: what was selected.
        facts, text, starts: as in `Trace`.
        prompt: tokens of the prompt.
    """
    steps = range(prompt - 1, len(starts) - 1)
    kept = [position for position in steps if position not in recorder.dropped]
    layers = sorted({layer for cells in recorder.cells.values() for layer in cells})
    grid = [[recorder.cells.get(position, {}).get(layer) for layer in layers] for position in kept]
    cells = [cell for row in grid for cell in row]
    lengths = [0 if cell is None else len(cell.indices) for cell in cells]
    heads = next((cell.head_shares.shape[1] for cell in cells if cell is not None), 0)
    present = [cell for cell in cells if cell is not None]
    return Trace(
        {**facts, "dropped_steps": len(steps) - len(kept)},
        text,
        np.asarray(starts, np.int32),
        prompt,
        np.asarray(layers, np.int32),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([np.zeros(0, np.int32), *(cell.indices for cell in present)]),
        np.concatenate([np.zeros(0, np.float16), *(cell.votes for cell in present)]),
        np.concatenate([np.zeros((0, heads), np.uint8), *(cell.head_shares for cell in present)]),
        _table(grid, lambda cell: cell.window_start, 0, np.int32),
        _table(grid, lambda cell: -1 if cell.served is None else cell.served, -1, np.int8),
        _table(grid, lambda cell: cell.mass, float("nan"), np.float32),
    )


def _table(grid: list[list[Cell | None]], read: Any, absent: float, dtype: type[Any]) -> NDArray[Any]:
    values = [[absent if cell is None else read(cell) for cell in row] for row in grid]
    return np.asarray(values, dtype).reshape(len(grid), len(grid[0]) if grid else 0)
