"""What results/gpu.csv and results/gpu_model.csv say: part of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import median

from benchmarks.report import read_rows
from benchmarks.results_of import Row, of_last_run

Table = Callable[..., str]
Number = Callable[[float], str]

_PHASES = {
    "block bf16": "512-token block, bf16 keys scored",
    "block int8": "... int8 copy (the default)",
    "block bf16, one distance": "512-token block, one distance, bf16 keys",
    "block int8, one distance": "... int8 copy",
    "step bf16": "decode step, bf16 keys scored",
    "step int8": "... int8 copy (the default)",
    "step int8, one distance": "... int8 copy, one distance",
    "step hit": "decode step, Selection Cache hit",
    "step miss": "decode step, Selection Cache miss",
}
_SPEEDS = {
    "score bf16": "scoring alone, bf16 keys, GB/s",
    "copy of bf16 keys": "a copy of as many bytes, GB/s",
    "score int8": "scoring alone, int8 keys, GB/s",
    "copy of int8 keys": "a copy of as many bytes, GB/s",
}
_MODES = ("block bf16", "step bf16")  # the first of each is preceded by the dense kernel's time
_LAYER = """## On a GPU

{device}, torch {torch}, Transformers {transformers}; commit {commit}, {when}, `{command}`.

Attention of one layer, selection included, k = 2,048, times of captured CUDA graphs: how many times faster than the
best dense kernel that PyTorch has (cuDNN's or FlashAttention), whose times in microseconds come first. Decode steps are
timed as they run: with the Selection Cache the device finds out by itself whether the last selection serves again, a
hit, or not, a miss. Calls go round over as many layers as it takes for none to find keys or chosen tokens in the L2
cache. A copy of 1 GB moves {copy} GB/s, bytes read and written; smaller ones are faster. Scoring is counted by the
keys alone, which it reads once; what it writes, and how it pools queries, is in its time. Votes of this run do not
count by age (`vote_horizon=0`).

![times faster than dense, by context](../benchmarks/results/gpu.png)
"""
_MODEL = """### A whole model

{shape}'s shape at random weights in bf16 ({weights} GB), default settings, one sequence, the Transformers integration;
{device}, torch {torch}, Transformers {transformers}; commit {commit}, {when}, `{command}`. Dense is the model as
Transformers runs it: SDPA over its DynamicCache, the prompt in one pass, decode steps launched kernel by kernel, while
ours are CUDA graphs where every step selects. So the time of a step is next to that of its kernels alone, added up:
the rest is the host. Memory is what torch had allocated on the GPU, weights included: at its peak while the prompt is
read, and after it. Rows are keys and values of one token in one layer that a step brings in from host memory; random
weights select other tokens every time, a real model's steps fewer. At threshold 0 of the Selection Cache a step reuses
the last selection where no KV head's queries point away from those of then; at 1 none does, but every layer asks.
"""
_WITHIN_BUDGET = """### Contexts within the budget

The same model; {device}, commit {commit}, {when}, `{command}`. Both took turns; medians of seven turns: of a
prompt the best of three readings, of tokens the median of 24. The gain is the median of the turns' own ratios, as the
host's speed changes between turns. Short passes are as fast as the host launches kernels, and the layers of a prompt
go through ours one by one.
"""


def section(table: Table, number: Number) -> str:
    """The part of the page; empty where nothing was measured on a GPU."""
    layer, model, short = (of_last_run(read_rows(name)) for name in ("gpu", "gpu_model", "gpu_within_budget"))
    parts = [_layer(layer, table, number)] if layer else []
    parts += [_model(model, table)] if model else []
    return "\n".join(parts + ([_within_budget(short, table)] if short else []))


def _layer(rows: list[Row], table: Table, number: Number) -> str:
    copied = next(row["gb_per_s"] for row in rows if row["phase"] == "copy")
    parts = [_LAYER.format(copy=copied, **rows[0])]
    for shape in dict.fromkeys(row["shape"] for row in rows if row["shape"]):
        own = [row for row in rows if row["shape"] == shape]
        lengths = sorted({int(row["length"]) for row in own})
        found = {(row["phase"], int(row["length"])): row for row in own}
        head = [shape, *(f"{length // 1024}K" for length in lengths)]
        parts.append(table(head, _layer_rows(found, lengths, number)))
    return "\n".join(parts)


def _layer_rows(found: dict[tuple[str, int], Row], lengths: list[int], number: Number) -> Iterator[list[str]]:
    for phase, title in _PHASES.items():
        if phase in _MODES:
            kind = phase.split()[0]
            dense = [
                min(float(found[f"{kind} dense {name}", n]["p50_us"]) for name in ("flash", "cudnn")) for n in lengths
            ]
            yield [f"dense {kind}, us", *map(number, dense)]
        yield [title, *(f"{found[phase, n]['against_dense']}x" if (phase, n) in found else "" for n in lengths)]
    for phase, title in _SPEEDS.items():
        yield [title, *(number(float(found[phase, n]["gb_per_s"])) if (phase, n) in found else "" for n in lengths)]


def _model(rows: list[Row], table: Table) -> str:
    head = ("tokens", "method", "prompt, s", "tokens/s", "decode, ms", "kernels, ms", "peak, GB", "after, GB", "rows")
    text = _MODEL.format(weights=rows[0]["weights_gb"], **rows[0])
    return text + "\n" + table(head, map(_model_row, rows), text_columns=2)


def _within_budget(rows: list[Row], table: Table) -> str:
    found = {(row["method"], row["length"], row["phase"]): row for row in rows}
    cells = []
    for length, phase in dict.fromkeys((row["length"], row["phase"]) for row in rows):
        dense, ours = (found[name, length, phase] for name in ("dense", "tokenselect"))
        turns = zip(*(map(float, row["times_ms"].split()) for row in (dense, ours)), strict=True)
        gain = median(theirs / own for theirs, own in turns)
        cells.append([f"{int(length):,}", phase, *(f"{float(r['p50_ms']):.1f}" for r in (dense, ours)), f"{gain:.2f}x"])
    return _WITHIN_BUDGET.format(**rows[0]) + "\n" + table(("tokens", "", "dense, ms", "ours, ms", "gain"), cells, 2)


def _model_row(row: Row) -> Iterable[str]:
    names = ("decode_p50_ms", "step_kernels_ms", "peak_gb", "kept_gb", "rows_brought")
    seconds, speed, *rest = (row[name] for name in ("prefill_s", "prefill_tokens_per_s", *names))
    return [f"{int(row['length']):,}", row["method"], seconds, f"{int(speed):,}", *rest]
