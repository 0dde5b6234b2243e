"""What results/serving.csv says of vLLM with TokenSelect against stock vLLM: ratios, promises, part of the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

from benchmarks import results_of
from benchmarks.results_of import Time
from tokenselect.measure import quantiles

ENGINES = {"stock": "stock vLLM", "tokenselect": "vLLM with TokenSelect"}
TITLES = {
    ("long", "ttft"): "time to the first token",
    ("long", "token"): "time per token",
    ("concurrent", "total"): "8 requests at once, until all are answered",
    ("short", "ttft"): "short prompt, time to the first token",
    ("short", "token"): "short prompt, time per token",
}
# What is wanted: part, what, tokens, and how many times stock's speed.
_WANTED = (
    ("long", "ttft", 16_000, 3.0),
    ("long", "ttft", 32_000, 5.0),
    ("long", "token", 8_000, 1.0),
    ("long", "token", 32_000, 1.3),
    ("long", "token", 64_000, 2.0),
    ("concurrent", "total", 16_000, 3.0),
)
_SECTION = """## Serving with vLLM

{vllm}, SmolLM2-135M-Instruct in bf16, State of the Union addresses; both engines with chunked prefill ({chunk} tokens a
pass), the model {mode}; TokenSelect with the settings of `tokenselect serve`. One engine ran at a time, in turns. Stock
vLLM's window is lifted for the measurement: beyond 8,192 tokens its speed is real and its answers are not. Time per
token is the median of 16 after the prompt. In brackets how many times it was measured, each time in a new engine; short
prompts up to {samples} times in one engine.

![time to the first token and per token](../benchmarks/results/serving.png)
"""

Kind = tuple[str, str, int]  # part, what, tokens
Claim = tuple[str, float, float | None, str]  # promise, least, figure, the case that the figure is from


def times(engine: str) -> dict[Kind, list[float]]:
    """Seconds of an engine, by kind; "shared", where places in a row matter, is told by `shared`."""
    found: dict[Kind, dict[tuple[str, str], float]] = {}
    for row in _rows():
        if row["engine"] == engine and row["part"] != "shared":
            kind = (row["part"], row["what"], int(row["length"]))
            # what was measured again after an interruption counts once
            found.setdefault(kind, {})[row["repeat"], row["number"]] = float(row["seconds"])
    return {kind: [*values.values()] for kind, values in sorted(found.items())}


def quantiles_of(engine: str) -> dict[Kind, Time]:
    """The same in milliseconds, as quantiles."""
    return {kind: Time(*(1e3 * value for value in quantiles(seconds))) for kind, seconds in times(engine).items()}


def ratios() -> dict[Kind, float]:
    """Stock's median time over ours, where both were measured."""
    stock, ours = times("stock"), times("tokenselect")
    return {kind: statistics.median(stock[kind]) / statistics.median(ours[kind]) for kind in stock if kind in ours}


def shared() -> dict[int, list[tuple[float, float]]]:
    """By tokens of the document: seconds to the first token, and tokens found cached, of each question in turn."""
    found: dict[int, dict[int, dict[str, tuple[float, int]]]] = {}
    for row in _rows():
        if row["part"] == "shared":
            places = found.setdefault(int(row["length"]), {}).setdefault(int(row["number"]), {})
            places[row["repeat"]] = float(row["seconds"]), int(row["cached"])
    return {length: [_medians(places[n].values()) for n in sorted(places)] for length, places in sorted(found.items())}


def claims() -> Iterator[Claim]:
    """What is wanted of serving, and what was measured."""
    known = ratios()
    for part, what, length, least in _WANTED:
        wanted = f"{least:g}x stock vLLM" if least != 1 else "no slower than stock vLLM"
        yield f"serving, {TITLES[part, what]}, {length:,} tokens: {wanted}", least, known.get((part, what, length)), ""
    short = [
        (ratio, f"{TITLES[part, what]}, {n:,} tokens") for (part, what, n), ratio in known.items() if part == "short"
    ]
    figure, at = min(short, default=(None, ""))
    yield "serving, short prompts: within 5% of stock vLLM's time", 1 / 1.05, figure, at
    gains = [
        (first / later, f"question {place}, {length:,} tokens")
        for length, ((first, _), *others) in shared().items()
        for place, (later, _) in enumerate(others, 2)
    ]
    figure, at = min(gains, default=(None, ""))
    yield "serving, further questions about one document: the first token 10x as soon as the first time", 10, figure, at


def section(table: Callable[..., str], number: Callable[[float], str]) -> str:
    """The section of docs/performance.md; empty where nothing was measured.

    Args:
        table: makes a Markdown table of a head and rows.
        number: a number for people.
    """
    rows = _rows()
    if not rows:
        return ""
    facts = {name: ", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("chunk", "mode", "vllm")}
    samples = max((int(row["number"]) for row in rows if row["part"] == "short"), default=1)
    parts = [_SECTION.format(**facts, samples=samples), _comparison(table, number)]
    return "\n".join([*parts, *(_questions(table, number, length, asked) for length, asked in shared().items())])


def _comparison(table: Callable[..., str], number: Callable[[float], str]) -> str:
    stock, ours, known = times("stock"), times("tokenselect"), ratios()
    devices = {(row["part"], int(row["length"])): row["device"] for row in _rows()}
    rows = []
    for part, what in TITLES:
        for kind in sorted(kind for kind in {**stock, **ours} if kind[:2] == (part, what)):
            cells = [_cell(engine.get(kind), number) for engine in (stock, ours)]
            gain = f"{known[kind]:.2f}x" if kind in known else ""
            rows.append([TITLES[part, what], f"{kind[2]:,}", *cells, gain, devices[part, kind[2]]])
    return table(("case", "tokens", *(f"{name}, ms" for name in ENGINES.values()), "gain", "processor"), rows)


def _questions(
    table: Callable[..., str], number: Callable[[float], str], length: int, asked: list[tuple[float, float]]
) -> str:
    title = f"Questions about the same {length:,} tokens, one after the other, with prefix caching (TokenSelect):\n\n"
    cells = [
        ["first token, ms", *(number(seconds * 1e3) for seconds, _ in asked)],
        ["tokens found cached", *(f"{cached:,.0f}" for _, cached in asked)],
    ]
    return title + table(["question", *(str(place) for place in range(1, len(asked) + 1))], cells)


def _cell(seconds: list[float] | None, number: Callable[[float], str]) -> str:
    return f"{number(statistics.median(seconds) * 1e3)} ({len(seconds)})" if seconds else ""


def _medians(measured: Iterable[tuple[float, int]]) -> tuple[float, float]:
    seconds, cached = zip(*measured, strict=True)
    return statistics.median(seconds), statistics.median(cached)


def _rows() -> list[results_of.Row]:
    """The rows to compare: those that ran like the file's first one; others are trials of other settings."""
    rows = results_of.rows_of("serving")
    return [row for row in rows if (row["mode"], row["chunk"]) == (rows[0]["mode"], rows[0]["chunk"])]
