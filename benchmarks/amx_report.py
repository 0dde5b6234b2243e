"""What results/block_attention_amx.csv and ops_amx.csv say: part of docs/performance.md.

The same benchmarks on an Intel processor with AMX, `BENCHMARK_RESULTS` being another folder. Rows of `ops_amx.csv` are
of two kernel sets: the one that such a processor took before there were kernels for its tiles, and these.
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
One operation with the kernels for tiles and with those of AVX-512 and bf16 products, in two runs (`ops_amx.csv`), ms:
"""


def section(table: Table, number: Number) -> str:
    """The part of the page; empty where nothing was measured on such a processor."""
    rows = read_rows("block_attention_amx")
    if not rows:
        return ""
    head = ("shape", "tokens before", "mix bf16, ms", "mix int8, ms", "dense, ms", "gain, bf16", "gain, int8")
    parts = [_TITLE.format(**rows[-1]), table(head, _block_rows(number))]
    head = ("operation", "shape", "tokens", "AVX-512", "AMX", "gain", "torch")
    return "\n".join(parts) + _OPS + "\n" + table(head, _operation_rows(number), 2)


def _block_rows(number: Number) -> Iterator[list[str]]:
    for (shape, length), case in blocks("block_attention_amx").items():
        ours = [number(case.ours["mix", keys].p50) for keys in ("bf16", "int8")]
        gains = [f"{case.speedup('mix', keys):.1f}x" for keys in ("bf16", "int8")]
        yield [shape, f"{length:,}", *ours, number(case.fastest_dense[1].p50), *gains]


def _operation_rows(number: Number) -> Iterator[list[str]]:
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read_rows("ops_amx"):
        if row["layout"] in ("", "contiguous") and row["scoring"] in ("", "mix") and row["operation"] != "topk_tokens":
            case = tuple(row[name] for name in ("operation", "keys", "queries", "shape", "length"))
            found.setdefault(case, {})[row["kernels"] or "torch"] = row
    for (operation, keys, queries, shape, length), rows in found.items():
        before, tiles = (float(rows[name]["p50_ms"]) for name in (_BEFORE, _TILES))
        torch = number(float(rows["torch"]["p50_ms"])) if "torch" in rows else ""
        name = f"`{operation}`, {keys}, {queries} quer{'y' if queries == '1' else 'ies'}"
        yield [name, shape, f"{int(length):,}", number(before), number(tiles), f"{before / tiles:.2f}x", torch]
