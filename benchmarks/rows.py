"""A file of rows that a time-boxed run goes on with."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import environment, row_key


class Rows:
    """A CSV file: what it has is not measured again, and nothing is begun when time is up.

    Args:
        path: of the file, which need not exist.
        key: columns that tell one measurement from another.
        device: that the rows are measured on.
        minutes: from now on; what is being measured then is finished.
    """

    def __init__(self, path: Path, key: Sequence[str], device: torch.device, minutes: float) -> None:
        self.path, self.key, self.device = path, key, device
        self._end = time.monotonic() + 60 * minutes
        self._known: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="") as file:
                self._known = {row_key(row, key) for row in csv.DictReader(file)}

    @property
    def is_over(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self._end

    def wants(self, **key: Any) -> bool:
        """Whether there is time left and no row with this key."""
        return not self.is_over and row_key(key, self.key) not in self._known

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Write rows at once, with what is needed to repeat them."""
        full = [row | environment(self.device) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(full[0]), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(full)
        self._known.update(row_key(row, self.key) for row in rows)
