"""`tokenselect eval`: are the answers right? Tasks by methods by lengths, through lm-eval."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions
from tokenselect.cli.session import METHOD_HELP, load
from tokenselect.config import TokenSelectConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenselect.evals.cells import Cell, Name
    from tokenselect.evals.harness.run import Request
    from tokenselect.evals.predictions import Prediction

_LENGTHS, _LIMIT = "4096,8000,16000", 20


def evaluate(
    model: ModelOptions,
    config: TokenSelectConfig,
    tasks: Annotated[str, typer.Option(help="names, separated by commas; `--tasks list` shows them")] = "passkey",
    method: Annotated[
        str,
        typer.Option(
            help=f"names, separated by commas: {METHOD_HELP}; tokenselect+select: selects within the window too;"
            " tokenselect+forced: the needle is forced into every selection"
        ),
    ] = "tokenselect",
    context: Annotated[str, typer.Option(help="tokens of a prompt, separated by commas")] = _LENGTHS,
    limit: Annotated[int, typer.Option(help="samples of each task and length")] = _LIMIT,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="the run's folder; default: a new one")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was ended")] = False,
    data: Annotated[
        str | None, typer.Option(help="folder, or data set on the hub, with the files of LongBench or InfiniteBench")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put prompts into the model's chat template")] = False,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="ask a running OpenAI-compatible server, such as .../v1, instead")
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="the name by which the server knows the model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the metrics as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the result, and errors")] = False,
) -> None:
    """Evaluate methods on tasks of several lengths; every answer is kept, so that a run can be resumed."""
    if tasks == "list":
        _print_tasks()
        return
    request = _request(tasks, method, context, limit, output, config, data, chat)
    _check(request, server, served_model)
    display = Display(quiet)
    interrupted = True
    with suppress(KeyboardInterrupt):
        _run(request, model, server, served_model, resume, display)
        interrupted = False
    _report(request, as_json, display)
    if interrupted:
        raise typer.Exit(130)


def _request(
    tasks: str,
    method: str,
    context: str,
    limit: int,
    output: Path | None,
    config: TokenSelectConfig,
    data: str | None,
    chat: bool,
) -> "Request":
    from tokenselect.evals.harness.run import Request

    folder = output or Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    lengths = [_number("--context", part) for part in _parts("--context", context)]
    if not 1 <= limit < 2**31:
        raise ValueError(f"--limit must be between 1 and {2**31 - 1}, got {limit}")
    return Request(_parts("--tasks", tasks), _parts("--method", method), lengths, limit, folder, config, data, chat)


def _parts(flag: str, text: str) -> list[str]:
    """What commas separate, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{flag} must be names or numbers separated by commas, got {text!r}")
    return list(dict.fromkeys(parts))


def _number(flag: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise ValueError(f"{flag} must be whole numbers between 1 and {2**31 - 1}, got {text!r}")
    return int(text)


def _check(request: "Request", server: str | None, served_model: str | None) -> None:
    """Refuse what cannot work before a model is loaded."""
    from importlib.util import find_spec

    from tokenselect.evals.answering import split_method
    from tokenselect.evals.harness.tasks import check_tasks

    check_tasks(request.tasks)
    for method in request.methods:
        split_method(method)
    if server is not None and served_model is None:
        raise ValueError("--server needs --served-model: the name by which the server knows the model")
    if find_spec("lm_eval") is None:
        raise ImportError("lm-eval is not installed: pip install 'tokenselect[eval]'")


def _run(
    request: "Request",
    model: ModelOptions,
    server: str | None,
    served_model: str | None,
    resume: bool,
    display: Display,
) -> None:
    from tokenselect.evals.harness.run import Server, prepare, run_in_process, run_on_server

    if server is not None:
        prepare(request, resume, {"model": served_model, "server": server})
        total = len(request.tasks) * len(request.lengths) * request.limit
        with _progress(display, total) as told:
            run_on_server(request, Server(server, str(served_model), _tokenizer(model)), told)
        return
    loaded = load(model, display)
    prepare(request, resume, {"model": loaded.name, "device": str(loaded.model.device)})
    total = len(request.tasks) * len(request.lengths) * request.limit * len(request.methods)
    with _progress(display, total) as told:
        run_in_process(request, loaded, str(loaded.tokenizer.name_or_path), told)


def _tokenizer(model: ModelOptions) -> str:
    from tokenselect.models import EMBEDDED, embedded_model_path

    return str(embedded_model_path(lambda note: None)) if model.model in (None, EMBEDDED) else str(model.model)


class _progress:  # noqa: N801  (a context manager)
    """A bar of answers with the share of right ones; on a pipe, nothing."""

    def __init__(self, display: Display, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=display.console,
            transient=True,
            disable=display.console.quiet or not display.console.is_terminal,
        )
        self._task = self._bar.add_task("Asking", total=total)
        self._sum, self._count = 0.0, 0

    def __enter__(self) -> "Callable[[Prediction], None]":
        self._bar.start()
        return self._tell

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _tell(self, prediction: "Prediction") -> None:
        self._sum += prediction.score
        self._count += 1
        text = (
            f"{prediction.method}, {prediction.task}, {prediction.length:,} tokens; {self._sum / self._count:.0%} right"
        )
        self._bar.update(self._task, advance=1, description=text)


def _report(request: "Request", as_json: bool, display: Display) -> None:
    from tokenselect.evals.cells import metrics
    from tokenselect.evals.harness.run import finish

    if not request.predictions.exists():
        return
    cells = finish(request)
    if as_json:
        print(json.dumps({"folder": str(request.output), "cells": metrics(cells)}, indent=2))
    else:
        _print_table(metrics(cells))
    _draw(request, cells, display)
    display.note(f"everything is in {request.output}")


def _draw(request: "Request", cells: "dict[Name, Cell]", display: Display) -> None:
    from tokenselect.evals.charts import draw
    from tokenselect.evals.predictions import read

    with_depth = {one.task for one in read(request.predictions) if one.depth is not None}
    try:
        draw(cells, request.output, with_depth)
    except ImportError:
        display.note("no figures: matplotlib is not installed (pip install 'tokenselect[eval]')")


def _print_tasks() -> None:
    from tokenselect.evals.harness.tasks import DATA_TASKS
    from tokenselect.evals.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name:24}{task.family}")
    for name in DATA_TASKS:
        print(f"{name:40}with data, by lm-eval's name (--data)")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    settings = {row["settings"] for row in rows if row["settings"]}
    caption = next(iter(settings)) if len(settings) == 1 else None
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for title in ("task", "tokens", "method", "score", "95%", "n", "to dense", "p", "s"):
        table.add_column(title, no_wrap=title != "method", justify="left" if title in ("task", "method") else "right")
    for row in rows:
        table.add_row(*_cells(row, shows_settings=caption is None))
    Console().print(table)


def _cells(row: dict[str, Any], shows_settings: bool) -> list[str]:
    against = row.get("against_dense")
    low, high = row["interval"]["low"], row["interval"]["high"]
    return [
        row["task"],
        f"{row['length']:,}" if row["length"] else "as given",
        f"{row['method']} {row['settings']}".strip() if shows_settings else row["method"],
        f"{row['score']:.0%}",
        f"{low:.0%}-{high:.0%}",
        str(row["n"]),
        f"+{against['only_first']} -{against['only_second']}" if against else "",
        f"{against['p']:.2g}" if against else "",
        f"{row['seconds_per_sample']:.1f}",
    ]
