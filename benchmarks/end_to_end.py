"""How fast, and with how much memory, against the same model with dense attention, in one process.

    python -m benchmarks.end_to_end latency               # against llama.cpp too, which `make llama` installs
    python -m benchmarks.end_to_end prefill --length 32000
    python -m benchmarks.end_to_end within-budget
    python -m benchmarks.end_to_end memory --length 32000

Methods take turns, so that noise of the machine meets all of them; medians are reported. Rows go to results/*.csv.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from rich import print as show

from benchmarks.engines import BLOCK, ENGINES
from benchmarks.latency import measure_latency, prompt
from benchmarks.report import append_rows
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.measure import read_and_write
from tokenselect.memory import PeakMemory, kv_bytes, settled_memory
from tokenselect.models import LoadedModel, load_model

app = typer.Typer(add_completion=False, help=__doc__)
_LENGTHS = [1024, 4096, 8192, 16384, 32768, 65536]


@app.command()
def latency(
    lengths: Annotated[list[int], typer.Option("--length", help="tokens of the prompt, multiples of 512")] = _LENGTHS,
    methods: Annotated[list[str], typer.Option("--method", help=f"of {', '.join(ENGINES)}")] = list(ENGINES),  # noqa: B006
    repeats: Annotated[int, typer.Option(help="most runs of each")] = 5,
    seconds: Annotated[float, typer.Option(help="who has taken so long at a length is not repeated")] = 240.0,
    decode: Annotated[int, typer.Option(help="tokens decoded after the prompt")] = 32,
    limit: Annotated[float, typer.Option(help="seconds of a prefill; above it the last block alone is read")] = 1200.0,
    threads: Annotated[int, typer.Option(help="torch threads; 0: what torch chooses")] = 0,
) -> None:
    """Time to the first token and per token, of TokenSelect, sinks + local, dense attention and llama.cpp."""
    if wrong := [length for length in lengths if length < BLOCK or length % BLOCK]:
        raise typer.BadParameter(f"--length must be a multiple of {BLOCK}, got {wrong[0]}")
    if threads:
        torch.set_num_threads(threads)
    loaded = load_model()
    for length in lengths:
        measure_latency(loaded, methods, length, repeats, seconds, decode, limit)


@app.command()
def prefill(
    length: Annotated[int, typer.Option(help="tokens of the prompt")] = 32_000,
    repeats: Annotated[int, typer.Option(help="runs of each method")] = 3,
    dense_repeats: Annotated[int, typer.Option(help="runs of dense attention, which takes minutes")] = 1,
    decode: Annotated[int, typer.Option(help="tokens decoded after it")] = 16,
) -> None:
    """Tokens read and written per second at a length beyond the window."""
    loaded, ids = load_text(length)
    methods = ("tokenselect", "streaming", "dense")
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for i in range(repeats):
        for method in methods:
            if method != "dense" or i < dense_repeats:
                times[method].append(_run(loaded, ids, method, decode))
                show(method, [round(part, 3) for part in times[method][-1]])
    for method, runs in times.items():
        read, step = (statistics.median(part) for part in zip(*runs, strict=True))
        row = {"length": length, "method": method, "repeats": len(runs), "prefill_s": round(read, 2)}
        row |= {"prefill_tokens_per_s": round(length / read, 1), "decode_ms_per_token": round(step * 1000, 1)}
        _report("prefill", row)


@app.command()
def within_budget(
    lengths: Annotated[list[int], typer.Option("--length", help="tokens of the prompt")] = [256, 600, 1100],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="rounds")] = 15,
    decode: Annotated[int, typer.Option(help="tokens decoded in a round")] = 32,
) -> None:
    """What it costs where nothing needs to be selected: our time over the plain model's."""
    for length in lengths:
        loaded, ids = load_text(length)
        rounds = []
        for i in range(repeats):
            order = ("dense", "tokenselect") if i % 2 else ("tokenselect", "dense")
            rounds.append({method: _run(loaded, ids, method, decode) for method in order})
        for part, name in enumerate(("prefill", "decode")):
            plain, ours = (statistics.median(r[m][part] for r in rounds) for m in ("dense", "tokenselect"))
            ratios = [r["tokenselect"][part] / r["dense"][part] for r in rounds]
            row = {"length": length, "phase": name, "rounds": repeats, "plain_ms": round(plain * 1000, 2)}
            row |= {
                "tokenselect_ms": round(ours * 1000, 2),
                "median_ratio": round(statistics.median(ratios), 3),
            }
            _report("within_budget", row)


@app.command()
def memory(length: Annotated[int, typer.Option(help="tokens of the prompt")] = 32_000) -> None:
    """Peak resident memory of a prefill beyond weights and KV."""
    loaded, ids = load_text(length)
    with TokenSelect(loaded.model), torch.no_grad():
        loaded.model(ids[:, :600], logits_to_keep=1)  # what is made once
        before = settled_memory()
        peak = PeakMemory(torch.device("cpu"))
        loaded.model(ids, logits_to_keep=1)
        used = peak.read() - before
    cache = kv_bytes(loaded.model.config, length, loaded.model.dtype)
    row = {"length": length, "kv_mb": round(cache / 1e6), "peak_beyond_weights_mb": round(used / 1e6)}
    _report("memory", row | {"peak_beyond_weights_and_kv_mb": round((used - cache) / 1e6)})


def load_text(length: int) -> tuple[LoadedModel, torch.Tensor]:
    """The embedded model, and [1, length] tokens of real text."""
    loaded = load_model()
    return loaded, prompt(loaded, length)


def _run(loaded: LoadedModel, ids: torch.Tensor, method: str, decode: int) -> tuple[float, float]:
    """Seconds of the prefill, and the median of a decode step."""
    run = read_and_write(loaded, ids, method, TokenSelectConfig(), decode)
    return run.prefill_s, statistics.median(run.steps_s)


def _report(name: str, row: dict[str, Any]) -> None:
    append_rows(name, [row])
    show(name, row)


if __name__ == "__main__":
    app()
