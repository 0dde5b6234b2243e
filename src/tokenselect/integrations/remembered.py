"""The Selection Cache of a layer where decode steps decide by themselves: on the device, read back when asked for.

A `SelectionState` says the same on the host. Only one of the two is up to date, and who needs the other brings it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenselect.selection import SelectionState

_NEVER = -(2**40)  # where the window began if nothing was selected: too far back to serve


@dataclass(frozen=True, slots=True)
class Attended:
    """Rows of the cache that the queries of a step attend, one query a sequence.

    Attributes:
        slots: [B, n] int64; a sequence's sinks, its selected tokens, its local window, and then any of its rows.
        bounds: [4 * B] int64; for each sequence its query, 1, where its slots begin, and how many are attended.
        served: [B] int64, not 0 where the last selection serves again; None: it never does.
    """

    slots: Tensor
    bounds: Tensor
    served: Tensor | None = None


class Remembered:
    """What a layer selected last for each sequence of its cache.

    Args:
        rows: of the cache at which the sequences begin.
        padding: rows before each sequence's first token.
        num_slots: the most tokens that a query attends.
        selected: which of these are the selected ones.
        device: of the cache.
    """

    def __init__(
        self, rows: Sequence[int], padding: list[int], num_slots: int, selected: slice, device: torch.device
    ) -> None:
        self.padding, self.firsts = padding, [row + pad for row, pad in zip(rows, padding, strict=True)]
        self.first = torch.tensor(self.firsts, device=device)
        # Where the window began, whether the last step was served; lookups, hits, tokens attended and available
        self.numbers = torch.zeros((6, len(self.firsts)), dtype=torch.int64, device=device)
        bounds = torch.zeros(4 * len(self.firsts), dtype=torch.int64, device=device)
        slots = self.first[:, None].repeat(1, num_slots)
        slots[:, : selected.start] += torch.arange(selected.start, device=device)
        self.attended = Attended(slots, bounds, self.numbers[1])
        self.queries: Tensor | None = None  # [B, Hq, D] float32
        self._selected, self._is_ahead = selected, False  # of the host's states

    def last_queries(self, like: Tensor) -> Tensor:
        """Those of the last selections [B, Hq, D] float32, for queries of this shape."""
        if self.queries is None:
            self.queries = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        return self.queries

    def places(self) -> list[Tensor]:
        """What a step reads and writes; see `RawKeyLayer.places`."""
        kept = [self.first, self.numbers, self.attended.slots, self.attended.bounds]
        return kept if self.queries is None else [*kept, self.queries]

    def take(self, states: Sequence[SelectionState], length: int) -> None:
        """From now on the device knows more than the states of sequences of `length` tokens, padding counted."""
        if self._is_ahead:
            return
        self._is_ahead = True
        numbers = torch.zeros(self.numbers.shape, dtype=torch.int64)
        for i, (state, first) in enumerate(zip(states, self.firsts, strict=True)):
            numbers[0, i] = _NEVER
            if state.query is not None and state.indices is not None:
                numbers[0, i] = state.window_start
                self.last_queries(state.query.expand(len(states), -1, -1))[i] = state.query
                slots = self.attended.slots[i]
                slots[self._selected] = state.indices + first
                recent = slots[self._selected.stop :][: length - self.padding[i] - state.window_start]
                torch.arange(recent.shape[0], out=recent).add_(state.window_start + first)
        self.numbers.copy_(numbers, non_blocking=True)

    def give(self, states: Sequence[SelectionState]) -> None:
        """Bring the states up to date, which waits for the device."""
        if not self._is_ahead:
            return
        self._is_ahead = False
        for i, (state, numbers) in enumerate(zip(states, self.numbers.T.tolist(), strict=True)):
            window, served, lookups, hits, attended, available = numbers
            state.lookups, state.hits = state.lookups + lookups, state.hits + hits
            state.attended, state.available = state.attended + attended, state.available + available
            state.forget()
            if lookups:
                state.served = bool(served)
            if window != _NEVER and self.queries is not None:
                state.query, state.window_start = self.queries[i].clone(), window
                state.indices = self.attended.slots[i, self._selected] - self.firsts[i]
