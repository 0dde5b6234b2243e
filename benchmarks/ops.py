"""Every operation, by every backend and by plain torch, next to a plain read of the same memory.

    python -m benchmarks.ops
    python -m benchmarks.ops --operation topk_tokens --length 65536 --threads 2
    python -m benchmarks.ops --resume              # goes on where a run of the same commit ended

All take turns on copies of their inputs that together do not fit any cache; the read of those copies is one of them.
A backend that computes something else than `ops.reference` gets no numbers: the run ends with exit code 1.
Rows go to results/ops.csv; a row of the same case, device and threads is replaced.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, cast

import torch
import typer

from benchmarks.buffers import POOL_BYTES
from benchmarks.operations import attention, score, topk
from benchmarks.operations.case import OTHER_SET, Call, Case
from benchmarks.report import environment, known_rows, put_rows, row_key
from benchmarks.shapes import SHAPES
from benchmarks.stream import StreamReader
from tokenselect.hardware import keep_freed_memory
from tokenselect.measure import alternate, quantiles
from tokenselect.ops import Backend, cpu, reference

NAME = "ops"
KEY = ("operation", "scoring", "keys", "layout", "queries", "shape", "length", "method", "threads", "device")
_LENGTHS = [4096, 16384, 65536, 262144, 1048576]
_OPERATIONS = ["score_tokens", "topk_tokens", "sparse_attention"]
_GATE_LENGTH = 5120
_LEAST_STREAM = 8 << 20  # bytes: a read of fewer is over before all threads have begun


def main(
    operation: Annotated[list[str], typer.Option(help="which operations")] = _OPERATIONS,
    shape: Annotated[list[str], typer.Option(help="heads of which models")] = list(SHAPES),  # noqa: B006
    length: Annotated[list[int], typer.Option(help="tokens, multiples of 256 from 4096 on")] = _LENGTHS,
    threads: Annotated[list[int], typer.Option(help="torch threads")] = [1, 2],  # noqa: B006
    scoring: Annotated[list[str], typer.Option(help="of score_tokens")] = list(score.SCORINGS),  # noqa: B006
    keys: Annotated[list[str], typer.Option(help="of score_tokens")] = list(score.KEYS),  # noqa: B006
    layout: Annotated[list[str], typer.Option(help="of score_tokens")] = list(score.LAYOUTS),  # noqa: B006
    queries: Annotated[list[int], typer.Option(help="of sparse_attention")] = list(attention.QUERIES),  # noqa: B006
    method: Annotated[
        list[str] | None,
        typer.Option(help="only these; 'cpu, avx2' are its kernels"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="most runs of each, after a warm-up")] = 50,
    seconds: Annotated[float, typer.Option(help="a case is not repeated by who has taken so long")] = 1.0,
    resume: Annotated[bool, typer.Option(help="leave out what this commit has measured already")] = False,
) -> None:
    """Measure the operations."""

    if wrong := [tokens for tokens in length if tokens < _LENGTHS[0] or tokens % 256]:
        raise typer.BadParameter(f"--length must be a multiple of 256 from {_LENGTHS[0]} on, got {wrong[0]}")
    choice = Choice(operation, shape, scoring, keys, layout, queries)
    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))  # as every host does: results lie in memory that is there already
    known: set[str] = set()
    for case in choice.cases([_GATE_LENGTH]):
        known |= case.calls().keys()
        refuse_wrong_results(case)
    if unknown := [name for name in method or [] if name not in known]:
        raise typer.BadParameter(f"--method must be one of {'; '.join(sorted(known))}, got {unknown[0]!r}")
    done = known_rows(NAME, KEY) if resume else set()
    for case in choice.cases(length):
        for count in threads:
            torch.set_num_threads(count)
            calls = {name: call for name, call in case.calls().items() if _is_wanted(name, method)}
            calls = {name: call for name, call in calls.items() if _row_key(case, name) not in done}
            if calls:
                put_rows(NAME, [_shown(row) for row in measure(case, calls, repeats, seconds)], KEY)
        del case  # gigabytes, before the next one is made
        gc.collect()


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for."""

    operations: list[str]
    shapes: list[str]
    scorings: list[str]
    keys: list[str]
    layouts: list[str]
    queries: list[int]

    def cases(self, lengths: list[int]) -> Iterator[Case]:
        """Each with its buffers, made when it is its turn."""
        for length in lengths:
            if "topk_tokens" in self.operations:
                yield from topk.cases(length)
            for name in self.shapes:
                if "score_tokens" in self.operations:
                    yield from score.cases(name, length, self.scorings, self.keys, self.layouts)
                if "sparse_attention" in self.operations:
                    yield from attention.cases(name, length, self.queries)


def refuse_wrong_results(case: Case) -> None:
    """End the run, with exit code 1, if somebody who is to be measured computes something else than the definition."""
    expected = case.compute(cast("Backend", reference), 0)
    for name, call in case.calls().items():
        if wrong := case.difference(call(0), expected):
            what = ", ".join(f"{column} {value}" for column, value in case.key.items())
            print(f"No numbers: {name} fails on {what}: {wrong}.", file=sys.stderr)
            raise typer.Exit(1)


def measure(case: Case, calls: dict[str, Call], repeats: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each call, all measured in turns with a read of as many bytes of the same buffers."""
    reader = StreamReader(case.pools, max(case.num_bytes, 2 * POOL_BYTES), max(case.num_bytes, _LEAST_STREAM))
    turns = itertools.count()

    def timed(call: Call) -> float:
        variant = next(turns) % case.num_variants
        started = time.perf_counter()
        call(variant)
        return time.perf_counter() - started

    def stream() -> float:
        # From the next variant on: it is then what was read the longest ago.
        return reader.read(next(turns) % case.num_variants / case.num_variants)

    times = alternate({name: partial(timed, call) for name, call in calls.items()} | {"": stream}, repeats + 1, seconds)
    bandwidth = reader.num_bytes / quantiles(times.pop("")).p50
    own = {"stream_gb_per_s": round(bandwidth / 1e9, 2), "stream_reader": reader.name}
    # The first run of each is a warm-up, unless it took so long that there was no other one.
    return [_row(case, name, taken[1:] or taken, bandwidth) | own for name, taken in times.items()]


def _row(case: Case, method: str, taken: list[float], bandwidth: float) -> dict[str, Any]:
    columns = ("operation", "scoring", "keys", "layout", "queries", "shape", "length")
    row: dict[str, Any] = {column: case.key.get(column, "") for column in columns} | {"method": method}
    times = quantiles(taken)
    own = cpu.instruction_set() if method == cpu.NAME else method.removeprefix(OTHER_SET)
    row |= {"kernels": own if method.startswith(cpu.NAME) else "", "repeats": len(taken)}
    row |= {f"{name}_ms": round(value * 1e3, 4) for name, value in times._asdict().items()}
    row |= {"mb": round(case.num_bytes / 1e6, 3), "gb_per_s": round(case.num_bytes / times.p50 / 1e9, 2)}
    row |= {"share_of_stream": round(case.num_bytes / times.p50 / bandwidth, 3)}
    return row | {"gflop_per_s": round(case.num_flops / times.p50 / 1e9, 1) if case.num_flops else ""}


def _is_wanted(name: str, methods: list[str] | None) -> bool:
    return name in methods if methods else not name.startswith(OTHER_SET)


def _row_key(case: Case, method: str) -> tuple[str, ...]:
    return row_key({**case.key, "method": method, **environment()}, KEY)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    case = " ".join(str(row[name]) for name in KEY[:7] if row[name] != "")
    print(
        f"{case}, {torch.get_num_threads()} threads, {row['method']}: {row['p50_ms']:.3f} ms, "
        f"{row['gb_per_s']:.1f} GB/s, {row['share_of_stream']:.0%} of a stream read ({row['repeats']} runs)",
        flush=True,
    )
    return row


if __name__ == "__main__":
    typer.run(main)
