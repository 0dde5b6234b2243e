"""Answers summed up: a cell is one task, length, method and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from tokenselect.evals.predictions import Prediction
from tokenselect.evals.question import depth_of
from tokenselect.evals.statistics import Interval, McNemar, mcnemar, wilson

BASELINE = "dense"


class Name(NamedTuple):
    """What tells a cell from others."""

    task: str
    length: int
    method: str
    settings: str


@dataclass(slots=True)
class Cell:
    """The scores of a cell by sample, and the seconds that its answers took."""

    scores: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.scores)

    @property
    def score(self) -> float:
        """Their mean, from 0 to 1."""
        return sum(self.scores.values()) / self.n

    @property
    def interval(self) -> Interval:
        """Wilson's, at 95%."""
        return wilson(sum(self.scores.values()), self.n)

    def against(self, other: Cell) -> McNemar:
        """McNemar's test on the samples that both have; right is a full score."""
        pairs = self.pairs(other)
        return mcnemar([a >= 1 for a, _ in pairs], [b >= 1 for _, b in pairs])

    def pairs(self, other: Cell) -> list[tuple[float, float]]:
        """Both scores of the samples that both have."""
        return [(self.scores[i], other.scores[i]) for i in sorted(self.scores.keys() & other.scores.keys())]

    def by_depth(self) -> dict[float, float]:
        """Mean score by depth of the needle."""
        found: dict[float, list[float]] = {}
        for number, score in self.scores.items():
            found.setdefault(depth_of(number), []).append(score)
        return {depth: sum(scores) / len(scores) for depth, scores in sorted(found.items())}


def cells_of(predictions: Iterable[Prediction]) -> dict[Name, Cell]:
    """The cells of predictions, by task, length and method in the order in which they came."""
    cells: dict[Name, Cell] = {}
    for one in predictions:
        cell = cells.setdefault(Name(one.task, one.length, one.method, one.settings), Cell())
        cell.scores[one.number] = one.score
        cell.seconds.append(one.seconds)
    return cells


def metrics(cells: Mapping[Name, Cell]) -> list[dict[str, Any]]:
    """What metrics.json holds: a dictionary for each cell, with McNemar's test against dense where that ran."""
    return [_metrics(name, cell, cells) for name, cell in cells.items()]


def _metrics(name: Name, cell: Cell, cells: Mapping[Name, Cell]) -> dict[str, Any]:
    found = name._asdict() | {"n": cell.n, "score": cell.score, "interval": cell.interval._asdict()}
    found["seconds_per_sample"] = median(cell.seconds)
    dense = cells.get(name._replace(method=BASELINE, settings=""))
    if dense is not None and name.method != BASELINE:
        found["against_dense"] = cell.against(dense)._asdict()
    return found
