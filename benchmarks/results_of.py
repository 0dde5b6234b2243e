"""What the CSV files say, as numbers: read by the plots and by docs/performance.md, so that both tell the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.report import read_rows
from benchmarks.shapes import SHAPES

FILES = ("ops", "block_attention", "latency", "within_budget", "serving")
THREADS = 2
# Columns that tell what is compared, and so comes from one processor; of the other files it is everything.
_MEASURED_TOGETHER = {"serving": ("part", "length")}

Row = dict[str, str]


def rows_of(name: str, threads: int | None = THREADS) -> list[Row]:
    """Rows of a file; where cases were measured again on another processor, those from the last one.

    Args:
        name: of the file.
        threads: of the rows; None: any number of them.
    """
    alike = _MEASURED_TOGETHER.get(name, ())
    rows = read_rows(name)
    last = {tuple(row[column] for column in alike): row["device"] for row in rows}
    rows = [row for row in rows if row["device"] == last[tuple(row[column] for column in alike)]]
    return [row for row in rows if threads is None or int(row["threads"]) == threads]


def of_last_run(rows: list[Row]) -> list[Row]:
    """Those of the commit and the device that the last row is of."""
    last = [(row["commit"], row["device"]) for row in rows[-1:]]
    return [row for row in rows if (row["commit"], row["device"]) in last]


def devices(*names: str) -> str:
    """The processors that these files' rows are from."""
    return ", ".join(dict.fromkeys(row["device"] for name in names for row in rows_of(name)))


@dataclass(frozen=True, slots=True)
class Time:
    """A measured time in milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, row: Row) -> Time:
        """The time of a row."""
        return cls(*(float(row[f"{name}_ms"]) for name in ("p20", "p50", "p80")))


def latency() -> dict[tuple[str, str, int], Time]:
    """By phase (prefill, block, decode), method and length."""
    return {(row["phase"], row["method"], int(row["length"])): Time.of(row) for row in rows_of("latency")}


def voted(scorings: Iterable[str]) -> str:
    """Of the scorings that were measured the one by which the default settings vote; before they did so, the mix."""
    return "merged" if "merged" in scorings else "mix"


@dataclass(frozen=True, slots=True)
class Blocks:
    """One shape and length: TokenSelect by (scoring, keys), and each dense kernel."""

    ours: dict[tuple[str, str], Time]
    dense: dict[str, Time]

    @property
    def scoring(self) -> str:
        """That of the default settings."""
        return voted({scoring for scoring, _ in self.ours})

    @property
    def fastest_dense(self) -> tuple[str, Time]:
        """Its name and time."""
        return min(self.dense.items(), key=lambda item: item[1].p50)

    def speedup(self, keys: str) -> float | None:
        """The fastest dense kernel's time over ours; None where one of them was not measured."""
        ours = self.ours.get((self.scoring, keys))
        return self.fastest_dense[1].p50 / ours.p50 if ours and self.dense else None


def blocks(name: str = "block_attention") -> dict[tuple[str, int], Blocks]:
    """By shape and length."""
    found: dict[tuple[str, int], Blocks] = {}
    for row in rows_of(name):
        case = found.setdefault((row["shape"], int(row["length"])), Blocks({}, {}))
        if row["method"] == "tokenselect":
            case.ours[row["scoring"], row["keys"]] = Time.of(row)
        else:
            case.dense[row["method"].removeprefix("dense ")] = Time.of(row)
    return dict(sorted(found.items(), key=lambda item: _by_shape(*item[0])))


@dataclass(frozen=True, slots=True)
class Operation:
    """One case of an operation."""

    operation: str
    scoring: str
    keys: str
    layout: str
    queries: str
    shape: str
    length: int

    def __str__(self) -> str:
        parts = [self.scoring.replace("_", "-"), self.keys, self.layout, self.shape if self.shape != "any" else ""]
        queries = f"{self.queries} queries" if self.queries not in ("", "1") else ""
        return ", ".join(filter(None, [self.operation, *parts, queries, f"{self.length:,} tokens"]))


def operations(threads: int = THREADS) -> dict[Operation, dict[str, Row]]:
    """Rows by case and method."""
    found: dict[Operation, dict[str, Row]] = {}
    names = ("operation", "scoring", "keys", "layout", "queries", "shape")
    for row in rows_of("ops", threads):
        case = Operation(**{name: row[name] for name in names}, length=int(row["length"]))
        found.setdefault(case, {})[row["method"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0].queries, *_by_shape(item[0].shape, item[0].length))))


def _by_shape(shape: str, length: int) -> tuple[int, int]:
    """Smallest shape first, whatever the order in which they were measured."""
    order = list(SHAPES)
    return (order.index(shape) if shape in order else -1, length)


def within_budget() -> dict[tuple[int, str], Row]:
    """The latest row by length and phase."""
    found = {(int(row["length"]), row["phase"]): row for row in rows_of("within_budget")}
    return dict(sorted(found.items()))
