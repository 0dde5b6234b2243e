"""What the project has promised of its speed, checked against the measured numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks import results_of, serving_report
from benchmarks.results_of import Operation, Row, Time

_OURS = "cpu"
_64K, _1M = 65536, 1048576
_BLOCKS = {131072: 40, 524288: 120, 1048576: 180}
PAPER = {131072: 6.09, 524288: 19.93, 1048576: 23.84}


@dataclass(frozen=True, slots=True)
class Check:
    """One promise.

    Attributes:
        figure: the number that decides, the worst of those that it speaks of; None: not measured.
        at: the case that it is from.
    """

    promise: str
    least: float
    figure: float | None
    at: str = ""
    percent: bool = False

    @property
    def holds(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.figure is None else self.figure >= self.least

    @property
    def shown(self) -> str:
        """The figure for people."""
        if self.figure is None:
            return "not measured"
        number = f"{self.figure:.0%}" if self.percent else f"{self.figure:.2f}x"
        return f"{number} ({self.at})" if self.at else number


def checks() -> Iterator[Check]:
    """All promises, in the order in which they were made."""
    yield from _operations()
    yield from _blocks()
    yield from _dense()
    yield from _llama()
    yield _short()
    yield from (Check(*claim) for claim in serving_report.claims())


def _worst(promise: str, least: float, figures: Iterable[tuple[float, str]], percent: bool = False) -> Check:
    figure, at = min(figures, default=(None, ""))
    return Check(promise, least, figure, at, percent)


def _operations() -> Iterator[Check]:
    cases = results_of.operations()
    scoring = results_of.voted({case.scoring for case in cases})
    for layout, least in (("contiguous", 0.8), ("pages of 256", 0.6)):
        for keys in ("bf16", "int8"):
            for length in (_64K, _1M):
                shares = [
                    (float(rows[_OURS]["share_of_stream"]), case.shape)
                    for case, rows in cases.items()
                    if (case.operation, case.scoring, case.keys) == ("score_tokens", scoring, keys)
                    and (case.layout, case.length) == (layout, length)
                    and _OURS in rows
                ]
                promise = f"scoring ({scoring}), {length:,} tokens, {keys}, {layout}: {least:.0%} of a stream read"
                yield _worst(promise, least, shares, percent=True)
    for length in (_64K, _1M):
        gains = _gains(cases, "topk_tokens", "torch.topk + sort", length)
        yield _worst(f"exact top 2,048 of {length:,}: 1.5x faster than torch.topk + sort", 1.5, gains)
    gains = _gains(cases, "sparse_attention", "torch gather + rotate + SDPA")
    yield _worst("decode attention over 2,688 tokens: 3x faster than gather + rotate + SDPA", 3, gains)


def _gains(
    cases: dict[Operation, dict[str, Row]], operation: str, other: str, length: int | None = None
) -> list[tuple[float, str]]:
    return [
        (float(rows[other]["p50_ms"]) / float(rows[_OURS]["p50_ms"]), f"{case.shape}, {case.length:,} tokens")
        for case, rows in cases.items()
        if case.operation == operation
        and case.queries in ("", "1")
        and length in (None, case.length)
        and _OURS in rows
        and other in rows
    ]


def _blocks() -> Iterator[Check]:
    cases = results_of.blocks()
    for keys in ("bf16", "int8"):
        for length, least in _BLOCKS.items():
            gains = [
                (gain, shape)
                for (shape, tokens), case in cases.items()
                if tokens == length and (gain := case.speedup(keys)) is not None
            ]
            promise = f"a block at {length:,} tokens, k 2,048, {keys} keys scored: {least}x the fastest dense kernel"
            yield _worst(promise, least, gains)


def _dense() -> Iterator[Check]:
    times = results_of.latency()

    def gain(phase: str, length: int) -> list[tuple[float, str]]:
        return _ahead(times, "dense", phase, [length])

    yield _worst("prefill of 32K: 8x Transformers dense", 8, gain("prefill", 32768))
    yield _worst("decode at 4K: no slower than Transformers dense", 1, gain("decode", 4096))
    yield _worst("decode at 64K: 6x Transformers dense", 6, gain("decode", _64K))
    own = [times.get(("decode", "tokenselect", length)) for length in (4096, _64K)]
    ratio = [(own[0].p50 / own[1].p50, "")] if own[0] and own[1] else []
    yield _worst("our decode at 64K: at most twice the time of that at 4K (0.50x its speed)", 0.5, ratio)


def _llama() -> Iterator[Check]:
    times, other = results_of.latency(), "llama.cpp bf16"
    lengths = sorted({length for _, method, length in times if method == other})
    far = [length for length in lengths if length >= 4096]
    reads = [*_ahead(times, other, "prefill", far), *_ahead(times, other, "block", far)]
    yield _worst("prefill from 4K on: ahead of llama.cpp BF16", 1, reads)
    yield _worst("prefill of 32K: 15x llama.cpp BF16", 15, _ahead(times, other, "prefill", [32768]))
    later = [length for length in far if length >= 8192]
    yield _worst("decode from 8K on: ahead of llama.cpp BF16", 1, _ahead(times, other, "decode", later))
    yield _worst("decode at 4K: within 15% of llama.cpp BF16", 1 / 1.15, _ahead(times, other, "decode", [4096]))


def _ahead(
    times: dict[tuple[str, str, int], Time], other: str, phase: str, lengths: list[int]
) -> list[tuple[float, str]]:
    """Their time over ours, where both were measured."""
    pairs = [(times.get((phase, other, n)), times.get((phase, "tokenselect", n)), n) for n in lengths]
    what = ", a block at that depth" if phase == "block" else ""
    return [(theirs.p50 / ours.p50, f"{n:,} tokens{what}") for theirs, ours, n in pairs if theirs and ours]


def _short() -> Check:
    ratios = [
        (1 / float(row["median_ratio"]), f"{phase}, {length:,} tokens")
        for (length, phase), row in results_of.within_budget().items()
    ]
    return _worst("short contexts: within 3% of the plain model's time", 1 / 1.03, ratios)
