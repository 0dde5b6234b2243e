"""Where another method is faster than ours: found in the numbers, every cell of every file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import results_of, serving_report
from benchmarks.results_of import Time


@dataclass(frozen=True, slots=True)
class Loss:
    """One cell; times are medians in milliseconds."""

    what: str
    other: str
    ours: float
    theirs: float


def losses() -> Iterator[Loss]:
    """All of them, in the order of the files."""
    for threads in (1, 2):
        yield from _operations(threads)
    yield from _blocks()
    yield from _latency()
    yield from _short()
    yield from _serving()


def _operations(threads: int) -> Iterator[Loss]:
    for case, rows in results_of.operations(threads).items():
        if "cpu" in rows:
            ours = Time.of(rows["cpu"]).p50
            for method, row in rows.items():
                if (theirs := Time.of(row).p50) < ours:
                    yield Loss(f"{case}, {threads} thread{'s'[: threads - 1]}", method, ours, theirs)


def _blocks() -> Iterator[Loss]:
    for (shape, length), case in results_of.blocks().items():
        for (scoring, keys), time in case.ours.items():
            for name, dense in case.dense.items():
                if dense.p50 < time.p50:
                    what = f"block of 512, {scoring.replace('_', '-')}, {keys} keys scored, {shape}, {length:,} tokens"
                    yield Loss(what, f"dense {name}", time.p50, dense.p50)


def _latency() -> Iterator[Loss]:
    times = results_of.latency()
    for (phase, method, length), time in times.items():
        ours = times.get((phase, "tokenselect", length))
        if ours and time.p50 < ours.p50:
            yield Loss(f"{phase}, SmolLM2, {length:,} tokens", method, ours.p50, time.p50)


def _short() -> Iterator[Loss]:
    for (length, phase), row in results_of.within_budget().items():
        if float(row["median_ratio"]) > 1:
            ours, plain = float(row["tokenselect_ms"]), float(row["plain_ms"])
            yield Loss(f"{phase} of a short context, {length:,} tokens", "the plain model", ours, plain)


def _serving() -> Iterator[Loss]:
    stock, ours = (serving_report.quantiles_of(engine) for engine in serving_report.ENGINES)
    for (part, what, length), theirs in stock.items():
        own = ours.get((part, what, length))
        if own and theirs.p50 < own.p50:
            yield Loss(
                f"serving, {serving_report.TITLES[part, what]}, {length:,} tokens", "stock vLLM", own.p50, theirs.p50
            )
