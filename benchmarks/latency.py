"""Time to the first token and time per token of SmolLM2: TokenSelect, dense attention, sinks + local, llama.cpp.

All read the same real text with the same weights and number of threads, and take turns. What would read a prompt for
longer than a limit is measured at its depth instead: its cache is filled with the same tokens, read in pieces of 512
that do not see each other, and one more block of 512 is read after them. It then has a row "block" and none "prefill".
What TokenSelect and sinks + local take for a block there is seen while they read the whole prompt in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.engines import BLOCK, Engine, start
from benchmarks.report import put_rows
from tokenselect.evals.texts import state_of_the_union, token_window
from tokenselect.measure import Run, alternate, quantiles
from tokenselect.models import LoadedModel

NAME = "latency"
KEY = ("method", "length", "threads", "device")  # its phases are replaced together
_SHORT = 16_384  # up to there, whatever is slow is quick enough


def measure_latency(
    loaded: LoadedModel, methods: list[str], length: int, repeats: int, seconds: float, steps: int, limit: float
) -> None:
    """Measure one length and write its rows.

    Args:
        loaded: the embedded model.
        methods: of `engines.ENGINES`.
        length: tokens of the prompt, a multiple of 512.
        repeats: most runs of each.
        seconds: who has taken so long is not repeated.
        steps: tokens decoded after the first step, which is told apart.
        limit: seconds that reading the prompt may take.
    """
    ids = prompt(loaded, length)
    with ExitStack() as stack:
        calls, versions = {}, {}
        for name in methods:
            engine = start(name, loaded, length + steps + 2)
            stack.callback(engine.close)
            calls[name], versions[name] = _prepare(engine, ids, steps, limit), engine.version
        for name, runs in alternate(calls, repeats, seconds).items():
            rows = [row | {"engine": versions[name]} for row in _rows(name, length, runs)]
            put_rows(NAME, [_shown(row) for row in rows], KEY)


def prompt(loaded: LoadedModel, length: int) -> Tensor:
    """[1, length] tokens of State of the Union addresses."""
    text = token_window(loaded.tokenizer, state_of_the_union(), length + 64, 3_000_000)
    ids: Tensor = loaded.tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return ids[:, :length]


# Seconds of "prefill" (all of it), "block" (512 tokens), "first step" (the second token, for which a method may have to
# prepare something) and "decode" (each token after it).
Phases = dict[str, list[float]]


def _prepare(engine: Engine, ids: Tensor, steps: int, limit: float) -> Callable[[], Phases]:
    """What is to be repeated, after a warm-up: the whole prompt, or its last block only."""
    engine.warm_up(ids)
    if not engine.is_quadratic or ids.shape[1] <= _SHORT:
        return lambda: _whole(engine.read(ids, steps + 1))
    depth = ids.shape[1] - BLOCK
    engine.fill(ids[:, :depth])
    last = partial(engine.read_after, depth, ids[:, depth:])
    # The blocks before it cost from nearly nothing to as much.
    if last(0).prefill_s * ids.shape[1] / BLOCK / 2 <= limit:
        return lambda: _whole(engine.read(ids, steps + 1))
    return lambda: _block(last(steps + 1))


def _whole(run: Run) -> Phases:
    phases = {"prefill": [run.prefill_s], **_steps(run)}
    if len(run.progress) > 3:  # the last chunk holds the prompt's tail, which selects token by token
        (before, started), (read, ended) = run.progress[-3:-1]
        phases["block"] = [(ended - started) * BLOCK / (read - before)]
    return phases


def _block(run: Run) -> Phases:
    return {"block": [run.prefill_s], **_steps(run)}


def _steps(run: Run) -> Phases:
    return {"first step": run.steps_s[:1], "decode": run.steps_s[1:]}


_TOKENS = {"block": BLOCK, "first step": 1, "decode": 1}


def _rows(method: str, length: int, runs: list[Phases]) -> list[dict[str, Any]]:
    rows = []
    for phase in runs[0]:
        times = quantiles([seconds for run in runs for seconds in run[phase]])
        row: dict[str, Any] = {"method": method, "length": length, "phase": phase, "repeats": len(runs)}
        row |= {f"{name}_ms": round(value * 1e3, 2) for name, value in times._asdict().items()}
        rows.append(row | {"tokens_per_s": round(_TOKENS.get(phase, length) / times.p50, 1)})
    return rows


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{row['method']} {row['length']} {row['phase']}: {row['p50_ms']:,.1f} ms, {row['tokens_per_s']:,.1f} tokens/s "
        f"({row['repeats']} runs)",
        flush=True,
    )
    return row
