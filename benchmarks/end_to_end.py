"""How fast, and with how much memory, against the same model with dense attention, in one process.

    python -m benchmarks.end_to_end prefill --length 32000
    python -m benchmarks.end_to_end within-budget
    python -m benchmarks.end_to_end memory --length 32000

Methods take turns, so that noise of the machine meets all of them; medians are reported. Rows go to results/*.csv.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich import print as show
from transformers import DynamicCache

from benchmarks.report import append_rows
from tokenselect.config import TokenSelectConfig
from tokenselect.evals.texts import state_of_the_union, token_window
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.memory import PeakMemory, kv_bytes, settled_memory
from tokenselect.methods import attach
from tokenselect.models import LoadedModel, load_model

app = typer.Typer(add_completion=False, help=__doc__)
_METHODS = ("tokenselect", "streaming", "dense")


@app.command()
def prefill(
    length: Annotated[int, typer.Option(help="tokens of the prompt")] = 32_000,
    repeats: Annotated[int, typer.Option(help="runs of each method")] = 3,
    dense_repeats: Annotated[int, typer.Option(help="runs of dense attention, which takes minutes")] = 1,
    decode: Annotated[int, typer.Option(help="tokens decoded after it")] = 16,
) -> None:
    """Tokens read and written per second at a length beyond the window."""
    loaded, ids = load_text(length)
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in _METHODS}
    for i in range(repeats):
        for method in _METHODS:
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
    loaded = load_model()
    text = token_window(loaded.tokenizer, state_of_the_union(), length + 64, 3_000_000)
    return loaded, loaded.tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]


@torch.no_grad()
def _run(loaded: LoadedModel, ids: torch.Tensor, method: str, decode: int) -> tuple[float, float]:
    """Seconds of the prefill, and the median of a decode step."""
    model, cache = loaded.model, DynamicCache(config=loaded.model.config)

    def step(tokens: torch.Tensor) -> Any:
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    with attach(model, method, TokenSelectConfig(), None):
        read, token = _timed(lambda: step(ids))
        steps = []
        for _ in range(decode):
            seconds, token = _timed(lambda token=token: step(token))  # type: ignore[misc]
            steps.append(seconds)
    return read, statistics.median(steps)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _report(name: str, row: dict[str, Any]) -> None:
    append_rows(name, [row])
    show(name, row)


if __name__ == "__main__":
    app()
