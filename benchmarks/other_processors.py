"""What block_attention_*.csv and ops_*.csv in results/ say of other processors: part of docs/performance.md.

The same benchmarks, `BENCHMARK_RESULTS` being another folder. Rows of `ops_amx.csv` are of two kernel sets in turns:
those that other processors with bf16 products take, and those for tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.report import read_rows
from benchmarks.results_of import Row, blocks, voted

Table = Callable[..., str]
Number = Callable[[float], str]

_BEFORE, _TILES = "avx512_bf16", "amx"
_AMX = """## On a processor with AMX

{device}, {threads} threads, torch {torch}; `python -m benchmarks.block_attention` at commit {commit}, {when}. There,
products are made by tiles: of attention of blocks, of bf16 keys that are scored, and of int8 keys where many rows meet
them. Dense attention is that of PyTorch, which uses tiles, too. Memory gives about 30 GB/s, so scoring waits for it.

A block of 512 tokens against the fastest dense kernel, selection included:
"""
_AMX_OPS = """
Operations with the kernels of AVX-512 and with those for tiles, in turns, ms, and what these are of a stream read;
torch gathers, rotates and attends by SDPA ([ops_amx.csv](../benchmarks/results/ops_amx.csv), commit {commit}). At
65,536 tokens copies fill 128 MB, which this processor's last cache, 480 MB by its own account, may hold in part:
"""
_ZEN4 = """## On a Zen 4

{device}, {threads} threads, torch {torch}; `python -m benchmarks.block_attention` at commit {commit}, {when}. It makes
half as many products a cycle as a Zen 5, and scoring waits for arithmetic ([experiments.md](experiments.md)).

A block of 512 tokens against the fastest dense kernel, selection included:
"""
_ZEN4_OPS = """
Operations, ms, and what they are of a stream read; torch gathers, rotates and attends by SDPA, or chooses and sorts
([ops_zen4.csv](../benchmarks/results/ops_zen4.csv), commit {commit}):
"""
_BLOCKS = ("shape", "tokens before", "bf16, ms", "int8, ms", "dense, ms", "gain, bf16", "gain, int8")


def section(table: Table, number: Number) -> str:
    """The part of the page; empty where nothing was measured on other processors."""
    tiles = ("operation", "shape", "tokens", "AVX-512", "AMX", "gain", "share", "torch")
    plain = ("operation", "shape", "tokens", "ours", "share", "torch", "gain")
    parts = [
        _processor("amx", (_AMX, _AMX_OPS), tiles, _with_tiles, table, number),
        _processor("zen4", (_ZEN4, _ZEN4_OPS), plain, _against_torch, table, number),
    ]
    return "\n".join(filter(None, parts))


def _processor(
    name: str,
    texts: tuple[str, str],
    head: tuple[str, ...],
    cells: Callable[[Mapping[str, Row], Number], list[str]],
    table: Table,
    number: Number,
) -> str:
    measured, operations = read_rows(f"block_attention_{name}"), read_rows(f"ops_{name}")
    if not measured:
        return ""
    parts = [texts[0].format(**measured[-1]), table(_BLOCKS, _block_rows(f"block_attention_{name}", number))]
    rows = [[*case, *cells(found, number)] for case, found in _by_case(operations)]
    return "\n".join(parts) + texts[1].format(**operations[-1]) + "\n" + table(head, rows, 2)


def _block_rows(name: str, number: Number) -> Iterator[list[str]]:
    for (shape, length), case in blocks(name).items():
        ours = [number(case.ours[case.scoring, keys].p50) for keys in ("bf16", "int8")]
        gains = [f"{case.speedup(keys):.1f}x" for keys in ("bf16", "int8")]
        yield [shape, f"{length:,}", *ours, number(case.fastest_dense[1].p50), *gains]


def _by_case(rows: list[Row]) -> Iterator[tuple[list[str], dict[str, Row]]]:
    """Operation, shape and tokens of each case, and its rows by kernel set, or "torch"."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    scoring = voted({row["scoring"] for row in rows})
    for row in rows:
        case = tuple(row[name] for name in ("operation", "keys", "layout", "queries", "shape", "length"))
        if row["scoring"] in ("", scoring):
            found.setdefault(case, {})[row["kernels"] or "torch"] = row
    for (operation, keys, layout, queries, shape, length), own in found.items():
        kind = layout if operation == "score_tokens" else f"{queries} quer{'y' if queries == '1' else 'ies'}"
        name = f"`{operation}`, {keys}, {kind}" if keys else f"`{operation}`"
        yield [name, shape, f"{int(length):,}"], own


def _share(row: Row) -> str:
    return f"{float(row['share_of_stream']):.0%}" if row["operation"] == "score_tokens" else ""


def _with_tiles(rows: Mapping[str, Row], number: Number) -> list[str]:
    before, tiles = (float(rows[name]["p50_ms"]) for name in (_BEFORE, _TILES))
    torch = number(float(rows["torch"]["p50_ms"])) if "torch" in rows else ""
    return [number(before), number(tiles), f"{before / tiles:.2f}x", _share(rows[_TILES]), torch]


def _against_torch(rows: Mapping[str, Row], number: Number) -> list[str]:
    ours = float(rows[_BEFORE]["p50_ms"])
    if "torch" not in rows:
        return [number(ours), _share(rows[_BEFORE]), "", ""]
    torch = float(rows["torch"]["p50_ms"])
    return [number(ours), _share(rows[_BEFORE]), number(torch), f"{torch / ours:.2f}x"]
