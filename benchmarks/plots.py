"""The figures, from the committed CSV files alone.

    python -m benchmarks.plots

Makes results/{latency,block_attention,serving,needles}.{png,svg}, of what was measured. Colours can be told apart with
every kind of colour vision (after Okabe and Ito, 2008), lines differ in their markers too, and the background is
transparent: lines, and the grey of axes and text, are read on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks import results_of, serving_report
from benchmarks.eval_rows import cells
from benchmarks.must_hold import PAPER
from benchmarks.report import RESULTS, read_rows
from tokenselect.evals.charts import heat_map

_GREY = "#808080"
_METHODS = {
    "tokenselect": ("TokenSelect", "#2A8FD6", "o"),
    "streaming": ("sinks + local", "#E69F00", "s"),
    "dense": ("Transformers, dense", "#D55E00", "^"),
    "llama.cpp bf16": ("llama.cpp, BF16", "#009E73", "D"),
    "llama.cpp q8_0": ("llama.cpp, Q8_0", "#CC79A7", "v"),
}
_ENGINES = {"tokenselect": ("#2A8FD6", "o"), "stock": ("#D55E00", "^")}
_SHAPES = {
    "smollm2": ("SmolLM2, 9/3 heads of 64", "#2A8FD6", "o"),
    "qwen2-7b": ("Qwen2-7B, 28/4 heads of 128", "#D55E00", "s"),
    "llama-3-8b": ("Llama-3-8B, 32/8 heads of 128", "#009E73", "^"),
}
_NEEDLE, _NEEDLE_METHODS = "fact_bible", ("tokenselect", "streaming", "dense")
_SETTINGS: Any = {
    "font.size": 9,
    "svg.hashsalt": "tokenselect",  # the same file from the same numbers
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
}


def main() -> None:
    """Draw what there are numbers for."""
    mpl.use("Agg")
    with plt.rc_context({**_SETTINGS, "grid.color": _GREY}):
        if results_of.rows_of("latency"):
            _save(_latency(), "latency")
        if results_of.rows_of("block_attention"):
            _save(_block_attention(), "block_attention")
        if results_of.rows_of("serving"):
            _save(_serving(), "serving")
        if read_rows("eval"):
            _save(_needles(), "needles")


def _needles() -> Figure:
    """Facts in a real text by tokens and depth, on the device that has most cells."""
    by_device = {row["device"]: cells(row["device"]) for row in read_rows("eval")}
    known = max(by_device.values(), key=len)
    order = [(method, name) for method in _NEEDLE_METHODS for name in known if name.method == method]
    shown = {name: known[name] for _, name in order if name.task == _NEEDLE and not name.settings}
    figure = plt.figure(figsize=(9, 3.2), layout="constrained")
    heat_map(figure, shown, _NEEDLE)
    return figure


def _latency() -> Figure:
    figure, (read, write) = plt.subplots(1, 2, figsize=(9, 3.6))
    times = results_of.latency()
    for method, (label, colour, marker) in _METHODS.items():
        for axes, phase in ((read, "prefill"), (write, "decode")):
            scale = 1e-3 if phase == "prefill" else 1.0
            points = sorted((n, t) for (what, name, n), t in times.items() if (what, name) == (phase, method))
            if points:
                _line(axes, [n for n, _ in points], [t for _, t in points], scale, label, colour, marker)
    _axes(read, "seconds to the first token", "prompt, tokens")
    _axes(write, "milliseconds per token", "tokens before it")
    read.legend(frameon=False, fontsize=8)
    figure.suptitle(_title("SmolLM2-135M, bf16", "latency"), fontsize=9)
    return figure


def _block_attention() -> Figure:
    figure, axes = plt.subplots(figsize=(9, 3.8))
    cases = results_of.blocks()
    for shape, (label, colour, marker) in _SHAPES.items():
        for keys, style in (("bf16", "-"), ("int8", "--")):
            points = sorted((n, case.speedup(keys)) for (name, n), case in cases.items() if name == shape)
            known = [(n, gain) for n, gain in points if gain is not None]
            if known:
                name = f"{label}, {keys}"
                axes.plot(*zip(*known, strict=True), style, color=colour, marker=marker, markersize=4, label=name)
    axes.plot(*zip(*PAPER.items(), strict=True), ":", color=_GREY, marker="x", label="the paper, Qwen2-7B on an A100")
    _axes(axes, "times the speed of dense attention", "tokens before the block")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(_title("attention of 512 queries, k 2,048, selection included", "block_attention"), fontsize=9)
    return figure


def _serving() -> Figure:
    figure, (read, write) = plt.subplots(1, 2, figsize=(9, 3.6))
    for engine, style in _ENGINES.items():
        times = serving_report.quantiles_of(engine)
        for axes, kind, scale in ((read, "ttft", 1e-3), (write, "token", 1.0)):
            points = sorted((n, time) for (_, what, n), time in times.items() if what == kind)
            if points:
                label = serving_report.ENGINES[engine]
                _line(axes, [n for n, _ in points], [time for _, time in points], scale, label, *style)
    _axes(read, "seconds to the first token", "prompt, tokens")
    _axes(write, "milliseconds per token", "tokens before it")
    read.legend(frameon=False, fontsize=8)
    figure.suptitle(_title("vLLM, SmolLM2-135M, bf16", "serving"), fontsize=9)
    return figure


def _line(
    axes: Axes,
    lengths: Sequence[int],
    times: Sequence[results_of.Time],
    scale: float,
    label: str,
    colour: str,
    marker: str,
) -> None:
    middle = [time.p50 * scale for time in times]
    axes.plot(lengths, middle, color=colour, marker=marker, markersize=4, label=label)
    axes.fill_between(lengths, *_band(times, scale), color=colour, alpha=0.2, linewidth=0)


def _band(times: Iterable[results_of.Time], scale: float) -> tuple[list[float], list[float]]:
    bounds = [(time.p20 * scale, time.p80 * scale) for time in times]
    return [low for low, _ in bounds], [high for _, high in bounds]


def _axes(axes: Axes, title: str, below: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=below)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xticks(sorted({int(x) for line in axes.lines for x in np.asarray(line.get_xdata())}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _tokens(int(tokens))))
    axes.xaxis.set_minor_locator(NullLocator())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else ""))
    axes.grid(True)


def _tokens(number: int) -> str:
    if number >= 1 << 20:
        return f"{number >> 20}M"
    if number % 1000 == 0:
        return f"{number // 1000}K"
    return f"{number >> 10}K" if number >= 1 << 10 else str(number)


def _title(what: str, name: str) -> str:
    return f"{what}; {results_of.devices(name)}, {results_of.THREADS} threads"


def _save(figure: Figure, name: str) -> None:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(RESULTS / f"{name}.{kind}", dpi=160, transparent=True, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    main()
