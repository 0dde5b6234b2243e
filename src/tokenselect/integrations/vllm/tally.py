"""What the layers of one process select, noted as they run and read once a forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch


@dataclass(slots=True)
class Tally:
    """Sums over layers since they were last read.

    Attributes:
        lookups: decode steps that asked the Selection Cache.
        hits: those that it served.
        further: tokens attended beyond what was planned: the local window of a selection that serves again.
        seconds: in which tokens were chosen.
    """

    lookups: int = 0
    hits: int = 0
    further: int = 0
    seconds: float = 0.0
    _running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Add the time of what runs inside."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._running.append((start, end))
        else:
            begin = perf_counter()
            yield
            self.seconds += perf_counter() - begin

    def take(self) -> Tally:
        """What was noted, which is then forgotten; what a GPU still computes stays."""
        while self._running and self._running[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._running.popleft()
            self.seconds += start.elapsed_time(end) / 1000
        taken = Tally(self.lookups, self.hits, self.further, self.seconds)
        self.lookups, self.hits, self.further, self.seconds = 0, 0, 0, 0.0
        return taken
