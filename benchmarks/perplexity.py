"""How well a long real text is foretold, by position: methods against a sliding window of the same budget.

    python -m benchmarks.perplexity --device cuda --minutes 3 --output results

Each sample is one stretch of a text, read at once; "window" reads every block afresh after as many tokens before it as
the method's budget has. One row per sample, method and range of positions is appended to
`perplexity.csv` in the output folder; what is there already is not measured again.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import print as show
from torch import Tensor

from benchmarks.eval_rows import anywhere
from benchmarks.evaluate import with_settings
from benchmarks.report import environment
from tokenselect.config import TokenSelectConfig
from tokenselect.evals.library import text_named
from tokenselect.evals.perplexity import losses, window_losses
from tokenselect.evals.predictions import settings_of
from tokenselect.evals.texts import token_window
from tokenselect.methods import attach
from tokenselect.models import LoadedModel, load_model

EDGES = (0, 2048, 4096, 8192, 16384, 32768, 65536)
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement."""

    text: str
    index: int
    length: int
    method: str
    settings: str


def main(
    texts: Annotated[str, typer.Option(help="names, separated by commas")] = "union,bible",
    methods: Annotated[str, typer.Option(help="names, separated by commas; window: see above")] = "tokenselect,window",
    length: Annotated[int, typer.Option(help="tokens of a sample")] = 65536,
    samples: Annotated[int, typer.Option(help="stretches of each text")] = 10,
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value of a setting; repeatable")] = None,
    model: Annotated[str | None, typer.Option(help="folder or GGUF file; default: the embedded model")] = None,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    minutes: Annotated[float, typer.Option(help="after which no new sample is begun")] = 480.0,
    output: Annotated[Path, typer.Option(help="folder for the rows")] = Path("build/eval"),
) -> None:
    """Measure every case that the output folder does not have yet."""
    deadline = time.monotonic() + 60 * minutes
    config = with_settings(TokenSelectConfig(), settings or [])
    path = output / "perplexity.csv"
    known = set(_known(path))
    loaded = load_model(model, device=device)
    for case in _cases(texts.split(","), methods.split(","), length, samples, settings_of(config)):
        if time.monotonic() > deadline:
            break
        if case not in known:
            _append(path, list(_measure(loaded, case, config)))


def _cases(texts: Sequence[str], methods: Sequence[str], length: int, samples: int, settings: str) -> Iterator[Case]:
    """All methods of a stretch come before the next stretch."""
    for index in range(samples):
        for text in texts:
            for method in methods:
                yield Case(text, index, length, method, "" if method == "dense" else settings)


def _measure(loaded: LoadedModel, case: Case, config: TokenSelectConfig) -> Iterator[dict[str, Any]]:
    text = text_named(case.text)
    start = int(len(text) * (case.index * _GOLDEN_RATIO % 1))
    # The last few tokens of a window may be missing, as it ends between two words: take one a little longer.
    window = token_window(loaded.tokenizer, text, case.length + 64, start)
    ids = loaded.tokenizer(window, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    begun = time.perf_counter()
    loss = _losses(loaded, ids[0, : case.length], case.method, config)
    seconds = round(time.perf_counter() - begun, 2)
    edges = [edge for edge in EDGES if edge < case.length] + [case.length]
    facts = anywhere(environment(loaded.model.device))
    for first, last in pairwise(edges):
        # The loss at i is that of token i + 1.
        nats = float(loss[max(first - 1, 0) : last - 1].double().mean())
        show(f"{case.text} {case.index} {case.method:12} {first:6,} to {last:6,}: {nats:.4f}  ({seconds} s)")
        row = {"text": case.text, "index": case.index, "length": case.length, "method": case.method}
        yield row | {
            "settings": case.settings,
            "from": first,
            "to": last,
            "nats": f"{nats:.5f}",
            "seconds": seconds,
            **facts,
        }


def _losses(loaded: LoadedModel, ids: Tensor, method: str, config: TokenSelectConfig) -> Tensor:
    if method == "window":
        return window_losses(loaded.model, ids, config.dense_limit, config.block_size)
    with attach(loaded.model, method, config, None):
        result = losses(loaded.model, ids)
    if loaded.model.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _known(path: Path) -> Iterator[Case]:
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield Case(row["text"], int(row["index"]), int(row["length"]), row["method"], row["settings"])


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
