"""What results/block_attention_amx.csv and ops_amx.csv say: part of docs/performance.md.

The same benchmarks on an Intel processor with AMX, `BENCHMARK_RESULTS` being another folder. Rows of `ops_amx.csv` are
of two kernel sets in turns: those that other processors with bf16 products take, and those for tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.report import read_rows
from benchmarks.results_of import Row, blocks

Table = Callable[..., str]
Number = Callable[[float], str]

_BEFORE, _TILES = "avx512_bf16", "amx"
_TITLE = """## On a processor with AMX

{device}, {threads} threads, torch {torch}; `python -m benchmarks.block_attention` at commit {commit}, {when}. There,
products are made by tiles: of attention of blocks, of bf16 keys that are scored, and of int8 keys where many rows meet
them. Dense attention is that of PyTorch, which uses tiles, too. Memory gives about 30 GB/s, so scoring waits for it.

A block of 512 tokens against the fastest dense kernel, selection included:
"""
_OPS = """
Operations with the kernels of AVX-512 and with those for tiles, in turns, ms, and what these are of a stream read;
torch gathers, rotates and attends by SDPA ([ops_amx.csv](../benchmarks/results/ops_amx.csv), commit {commit}). At
65,536 tokens copies fill 128 MB, which this processor's last cache, 480 MB by its own account, may hold in part:
"""


def section(table: Table, number: Number) -> str:
    """The part of the page; empty where nothing was measured on such a processor."""
    rows = read_rows("block_attention_amx")
    if not rows:
        return ""
    head = ("shape", "tokens before", "mix bf16, ms", "mix int8, ms", "dense, ms", "gain, bf16", "gain, int8")
    parts = [_TITLE.format(**rows[-1]), table(head, _block_rows(number))]
    head = ("operation", "shape", "tokens", "AVX-512", "AMX", "gain", "share", "torch")
    operations = _OPS.format(**read_rows("ops_amx")[-1])
    return "\n".join(parts) + operations + "\n" + table(head, _operation_rows(number), 2)


def _block_rows(number: Number) -> Iterator[list[str]]:
    for (shape, length), case in blocks("block_attention_amx").items():
        ours = [number(case.ours["mix", keys].p50) for keys in ("bf16", "int8")]
        gains = [f"{case.speedup('mix', keys):.1f}x" for keys in ("bf16", "int8")]
        yield [shape, f"{length:,}", *ours, number(case.fastest_dense[1].p50), *gains]


def _operation_rows(number: Number) -> Iterator[list[str]]:
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read_rows("ops_amx"):
        case = tuple(row[name] for name in ("operation", "keys", "layout", "queries", "shape", "length"))
        found.setdefault(case, {})[row["kernels"] or "torch"] = row
    for (operation, keys, layout, queries, shape, length), rows in found.items():
        before, tiles = (float(rows[name]["p50_ms"]) for name in (_BEFORE, _TILES))
        share = f"{float(rows[_TILES]['share_of_stream']):.0%}" if operation == "score_tokens" else ""
        torch = number(float(rows["torch"]["p50_ms"])) if "torch" in rows else ""
        kind = layout if operation == "score_tokens" else f"{queries} quer{'y' if queries == '1' else 'ies'}"
        gain = f"{before / tiles:.2f}x"
        name = f"`{operation}`, {keys}, {kind}"
        yield [name, shape, f"{int(length):,}", number(before), number(tiles), gain, share, torch]
