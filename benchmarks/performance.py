"""docs/performance.md, made from the CSV files alone.

    python -m benchmarks.performance

tests/test_performance_doc.py checks that the committed page is what this makes of the committed files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import gpu_report, other_processors, results_of, serving_report
from benchmarks.losses import losses
from benchmarks.must_hold import PAPER, checks
from benchmarks.operations.score import SCORINGS
from benchmarks.results_of import Operation, Row, Time

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_SCORED = [(keys, layout) for keys in ("bf16", "int8") for layout in ("contiguous", "pages of 256", "pages of 16")]
_METHODS = {
    "tokenselect": "TokenSelect",
    "streaming": "sinks + local",
    "dense": "Transformers dense",
    "llama.cpp bf16": "llama.cpp BF16",
    "llama.cpp q8_0": "llama.cpp Q8_0",
}
_INTRO = """# Performance

Made by `python -m benchmarks.performance` from the files under [benchmarks/results](../benchmarks/results), which
hold more: 20% and 80% quantiles, one thread, versions and command of every row. Times are medians; what is compared
took turns, in one process or, with llama.cpp, in processes of which one ran at a time. {threads} threads of an

{devices}"""
_OPS = """## Operations

Inputs are copies that together fill no cache. A *stream read* reads as many bytes of the same copies in one go with
the fastest of six reductions (torch sums and maxima, libc's `memcmp`), in turns with the operations. An operation
whose results differ from `ops.reference` is not measured. Contiguous: heads one after the other, as in the
Transformers cache; pages: tokens one after the other, as in vLLM.
"""
_BLOCKS = """## Attention of one block

One layer, 512 queries, 128 sinks, k = 2,048, 512 local tokens, bf16; scoring, top-k and attention included, through
the code that a model runs. Dense attention gets the fastest of three kernels (SDPA, explicit products over all keys,
explicit products over 4,096 keys at once), each with the heads of a group packed so that a key is loaded once. The
last column is what the paper reports for Qwen2-7B against FlashInfer on an A100.

![speed-up by context](../benchmarks/results/block_attention.png)
"""
_LATENCY = """## End to end

SmolLM2-135M-Instruct (dequantised from Q4_1; llama.cpp runs the same weights as BF16, and as Q8_0 made from them),
State of the Union addresses, default settings: up to 8,192 tokens are attended whole. llama.cpp has flash attention
on and keys and values in float16. Tokens decoded: 32 after each prompt and a first step. Beyond 16K, where reading
the prompt densely would take over 20 minutes, the cell under *prefill* is empty: only a block of 512 tokens at that
depth was read, in a cache that was filled in pieces of 512 which do not see each other.

![time to the first token and per token](../benchmarks/results/latency.png)
"""
_AGAIN = """## How to repeat it

`make bench` runs everything but the part with vLLM (`make bench-vllm`), draws the figures and writes this page.

"""


def render() -> str | None:
    """The page; None where nothing was measured."""
    if not results_of.devices(*results_of.FILES[:3]):
        return None
    parts = [_INTRO.format(devices=_devices(), threads=results_of.THREADS), _promises()]
    sections = (_operations, _blocks, _latency, _short, _serving, _other_processors, _gpu, _losses, _origins)
    parts += filter(None, (section() for section in sections))
    return "\n".join(parts)


def _devices() -> str:
    """Processors, and the files whose rows are from them."""
    found: dict[str, list[str]] = {}
    for name in results_of.FILES:
        for row in results_of.rows_of(name):
            if name not in found.setdefault(row["device"], []):
                found[row["device"]].append(name)
    return "".join(f"- {device}: {', '.join(names)}\n" for device, names in found.items())


def table(head: Iterable[str], rows: Iterable[Iterable[str]], text_columns: int = 1) -> str:
    """A Markdown table; all but the first columns are numbers."""
    titles = list(head)
    rule = ["---"] * text_columns + ["--:"] * (len(titles) - text_columns)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, rule, *(list(row) for row in rows)))


def _promises() -> str:
    verdicts = {True: "yes", False: "**no**", None: ""}
    rows = [(check.promise, check.shown, verdicts[check.holds]) for check in checks()]
    note = "Ratios within one run; of several shapes or lengths the worst counts, and is named.\n\n"
    return "## What must hold\n\n" + note + table(("promise", "figure", "holds"), rows, text_columns=3)


def _operations() -> str:
    cases = results_of.operations()
    if not cases:
        return ""
    parts = [_OPS]
    for scoring in SCORINGS:
        if rows := list(_score_rows(cases, scoring)):
            head = ["shape", "tokens", *(f"{keys}, {layout}" for keys, layout in _SCORED), "torch matmul"]
            title = f"`score_tokens`, {scoring.replace('_', '-')}: ms (share of a stream read)\n\n"
            parts.append(title + table(head, rows))
    for name, title in _OPERATIONS.items():
        if rows := list(_versus_rows(cases, name)):
            head = [
                "queries, shape",
                "tokens",
                "ours, ms",
                "of a stream read",
                "Gflop/s",
                "reference, ms",
                "torch, ms",
                "gain",
            ]
            parts.append(f"{title}\n\n" + table(head, rows))
    return "\n".join(parts)


_VERSUS = ("queries, shape", "tokens", "ours, ms", "of a stream read", "Gflop/s", "reference, ms", "torch, ms", "gain")
_OPERATIONS = {
    "topk_tokens": "`topk_tokens`, k = 2,048; torch: `torch.topk` and a sort",
    "sparse_attention": "`sparse_attention` over 2,688 tokens (a block: and its own); torch: gather, rotate, SDPA",
}


def _score_rows(cases: dict[Operation, dict[str, Row]], scoring: str) -> Iterator[list[str]]:
    found = [case for case in cases if (case.operation, case.scoring) == ("score_tokens", scoring)]
    for shape, length in dict.fromkeys((case.shape, case.length) for case in found):
        at = {(c.keys, c.layout): cases[c] for c in found if (c.shape, c.length) == (shape, length)}
        cells = [_with_share(at.get(kind, {}).get("cpu")) for kind in _SCORED]
        plain = at.get(("bf16", "contiguous"), {}).get("torch matmul")
        yield [shape, f"{length:,}", *cells, _ms(plain)]


def _versus_rows(cases: dict[Operation, dict[str, Row]], name: str) -> Iterator[list[str]]:
    for case, rows in cases.items():
        if case.operation == name:
            torch_row = next((row for method, row in rows.items() if method.startswith("torch")), None)
            ours = rows.get("cpu")
            gain = f"{_p50(torch_row) / _p50(ours):.2f}x" if ours and torch_row else ""
            share = f"{float(ours['share_of_stream']):.0%}" if ours else ""
            label = ", ".join(filter(None, (case.queries, case.shape)))
            flops = ours["gflop_per_s"] if ours else ""
            yield [label, f"{case.length:,}", _ms(ours), share, flops, _ms(rows.get("reference")), _ms(torch_row), gain]


def _p50(row: Row) -> float:
    return Time.of(row).p50


def _ms(row: Row | None) -> str:
    return "" if row is None else _number(_p50(row))


def _with_share(row: Row | None) -> str:
    return "" if row is None else f"{_ms(row)} ({float(row['share_of_stream']):.0%})"


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _blocks() -> str:
    cases = results_of.blocks()
    if not cases:
        return ""
    kinds = list(dict.fromkeys(kind for case in cases.values() for kind in case.ours))
    head = ["shape", "tokens before", *(f"{scoring.replace('_', '-')}, {keys}, ms" for scoring, keys in kinds)]
    head += ["dense, ms", "kernel", *(f"gain, {keys}" for keys in ("bf16", "int8")), "paper"]
    rows = []
    for (shape, length), case in cases.items():
        name, fastest = case.fastest_dense if case.dense else ("", None)
        ours = [_number(case.ours[kind].p50) if kind in case.ours else "" for kind in kinds]
        gains = [case.speedup(keys) for keys in ("bf16", "int8")]
        row = [shape, f"{length:,}", *ours, _number(fastest.p50) if fastest else "", name]
        row += ["" if gain is None else f"{gain:.1f}x" for gain in gains]
        rows.append([*row, f"{PAPER[length]}x" if length in PAPER else ""])
    return _BLOCKS + "\n" + _parts() + table(head, rows)


def _parts() -> str:
    """Where the time of a block goes."""
    rows = [row for row in results_of.rows_of("block_attention") if row["method"] == "tokenselect"]
    scoring = results_of.voted({row["scoring"] for row in rows})
    rows = [row for row in rows if row["scoring"] == scoring]
    cells = [
        [row["shape"], f"{int(row['length']):,}", row["keys"]]
        + [_number(float(row[f"{name}_ms"])) for name in ("copy", "score", "topk", "attend", "p50")]
        for row in rows
    ]
    head = (
        "shape",
        "tokens before",
        "keys scored",
        "int8 copy, ms",
        "scoring, ms",
        "top-k, ms",
        "attention, ms",
        "all, ms",
    )
    return f"Where the time goes ({scoring}):\n\n" + table(head, cells) + "\nAgainst dense attention:\n\n"


def _latency() -> str:
    times = results_of.latency()
    if not times:
        return ""
    lengths = sorted({length for _, _, length in times})
    titles = {"prefill": "Prefill, seconds to the first token", "decode": "Decode, ms per token"}
    titles["first step"] = "The first decode step after a prompt, ms (TokenSelect records the layers' work in it)"
    titles["block"] = "A block of 512 prompt tokens at that depth, ms (ours and sinks + local: from the whole prefill)"
    parts = [_LATENCY]
    for phase, title in titles.items():
        rows = []
        for method, name in _METHODS.items():
            found = [times.get((phase, method, length)) for length in lengths]
            scale = 1e-3 if phase == "prefill" else 1.0
            if any(found):
                rows.append([name, *(_number(time.p50 * scale) if time else "" for time in found)])
        if rows:
            parts.append(f"{title}:\n\n" + table(["tokens", *(f"{length:,}" for length in lengths)], rows))
    return "\n".join(parts)


def _short() -> str:
    rows = [
        [f"{length:,}", phase, row["plain_ms"], row["tokenselect_ms"], row["median_ratio"]]
        for (length, phase), row in results_of.within_budget().items()
    ]
    if not rows:
        return ""
    head = ("tokens", "phase", "plain model, ms", "TokenSelect, ms", "median of the ratios")
    return "## Contexts that are attended whole\n\n" + table(head, rows, text_columns=2)


def _serving() -> str:
    return serving_report.section(table, _number)


def _other_processors() -> str:
    return other_processors.section(table, _number)


def _gpu() -> str:
    return gpu_report.section(table, _number)


def _losses() -> str:
    rows = [(loss.what, loss.other, _number(loss.ours), _number(loss.theirs)) for loss in losses()]
    title = "## Where we lose\n\nAll cells in which another method is faster, with one thread and with two.\n\n"
    if not rows:
        return title + "None.\n"
    return title + table(("case", "who is faster", "ours, ms", "theirs, ms"), rows, text_columns=2)


def _origins() -> str:
    """Versions, commits and commands."""
    columns = ("torch", "transformers", "commit", "when", "command")
    origins = dict.fromkeys(
        (name, *(row[column] for column in columns))
        for name in results_of.FILES
        for row in results_of.rows_of(name, threads=None)
    )
    rows = [(f"[{name}.csv](../benchmarks/results/{name}.csv)", *rest[:-1], f"`{rest[-1]}`") for name, *rest in origins]
    engines = dict.fromkeys(row["engine"] for row in results_of.rows_of("latency", threads=None))
    ran = "".join(f"- {engine}\n" for engine in engines)
    head = ("file", "torch", "Transformers", "commit", "day", "command")
    return _AGAIN + table(head, rows, len(head)) + (f"\nWhat ran end to end:\n\n{ran}" if ran else "")


if __name__ == "__main__":
    page = render()
    if page is None:
        raise SystemExit("There are no results yet: run `make bench`.")
    PAGE.write_text(page, encoding="utf-8")
