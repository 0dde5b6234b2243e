"""`tokenselect bench`: how fast the methods are on this machine and with this model."""

import json
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions
from tokenselect.cli.session import METHOD_HELP, complete_method, load
from tokenselect.config import TokenSelectConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from tokenselect.measure import Run
    from tokenselect.models import LoadedModel

_LENGTHS = (4096, 16384)
_METHODS = ("tokenselect", "streaming", "dense")
_NAMES = ", ".join(_METHODS)
_ENOUGH_S = 60.0
_NOTE = (
    "Medians; the methods took turns. {threads} threads, {dtype} on {device}. "
    f"A method that took over {_ENOUGH_S:.0f} s at a length was not repeated."
)


def bench(
    model: ModelOptions,
    config: TokenSelectConfig,
    length: Annotated[
        list[int] | None, typer.Option(help="tokens of a prompt; may be repeated  [default: 4096 and 16384]")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"{METHOD_HELP}; may be repeated  [default: {_NAMES}]", autocompletion=complete_method),
    ] = None,
    repeats: Annotated[int, typer.Option(help="most runs of each method")] = 3,
    new_tokens: Annotated[int, typer.Option(help="tokens written after each prompt")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="all numbers as one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the result, and errors")] = False,
) -> None:
    """Measure how fast prompts are read and tokens written: TokenSelect, sinks + local tokens alone, dense attention.

    Takes a few minutes. Prompts are random tokens: speed depends on how many there are, not on what they say.
    """
    lengths, methods = list(length or _LENGTHS), list(method or _METHODS)
    _check(lengths, methods, repeats, new_tokens, config)
    display = Display(quiet)
    loaded = load(model, display)
    from tokenselect.memory import check_memory

    settings, host = config.for_window(loaded.trained_window), loaded.model
    check_memory(host.config, max(lengths) + new_tokens, host.dtype, host.device, settings)
    runs: dict[tuple[int, str], list[Run]] = {}
    interrupted = True
    with suppress(KeyboardInterrupt):
        for tokens in lengths:
            _measure(loaded, tokens, methods, config, repeats, new_tokens, runs, display)
        interrupted = False
    rows = [_row(tokens, name, taken) for (tokens, name), taken in runs.items() if taken]
    if as_json:
        print(json.dumps({"machine": _machine(loaded), "results": rows}, indent=2))
    elif rows:
        _print_table(rows, _machine(loaded))
    if interrupted:
        raise typer.Exit(130)


def _check(lengths: list[int], methods: list[str], repeats: int, new_tokens: int, config: TokenSelectConfig) -> None:
    from tokenselect.methods import method_config

    for name, value in [*(("length", one) for one in lengths), ("repeats", repeats), ("new-tokens", new_tokens)]:
        if not 1 <= value < 2**31:
            raise ValueError(f"--{name} must be between 1 and {2**31 - 1}, got {value}")
    for one in methods:
        method_config(one, config)


def _measure(
    loaded: "LoadedModel",
    length: int,
    methods: list[str],
    config: TokenSelectConfig,
    repeats: int,
    new_tokens: int,
    runs: "dict[tuple[int, str], list[Run]]",
    display: Display,
) -> None:
    """Fill `runs` as they come, so that nothing is lost by Ctrl-C."""
    from tokenselect.measure import alternate, read_and_write, warm_up

    ids = _random_prompt(loaded, length)
    calls: dict[str, Callable[[], None]] = {}
    for name in methods:
        with display.waiting(f"Warming up {name} for {length:,} tokens"):
            warm_up(loaded, ids, name, config)
        taken = runs[length, name] = []
        calls[name] = partial(
            _run, taken, partial(read_and_write, loaded, ids, name, config, new_tokens), name, display
        )
    alternate(calls, repeats, _ENOUGH_S)


def _run(taken: "list[Run]", call: "Callable[[], Run]", name: str, display: Display) -> None:
    with display.waiting(f"Measuring {name}"):
        taken.append(call())
    display.note(f"{name}: first token after {taken[-1].prefill_s:.2f} s")


def _random_prompt(loaded: "LoadedModel", length: int) -> "Tensor":
    import torch

    generator = torch.Generator().manual_seed(0)
    words = loaded.model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(words, (1, length), generator=generator).to(loaded.model.device)


def _row(length: int, method: str, runs: "list[Run]") -> dict[str, Any]:
    """Medians, and what a fifth and four fifths of the runs or steps stay below."""
    from tokenselect.measure import quantiles

    read = quantiles([run.prefill_s for run in runs])
    step = quantiles([seconds for run in runs for seconds in run.steps_s])
    return {
        "length": length,
        "method": method,
        "runs": len(runs),
        "first_token_s": read._asdict(),
        "prefill_tokens_per_s": length / read.p50,
        "ms_per_token": {name: seconds * 1000 for name, seconds in step._asdict().items()},
    }


def _machine(loaded: "LoadedModel") -> dict[str, Any]:
    import torch

    model = loaded.model
    facts = {"model": loaded.name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return facts | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def _print_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=_NOTE.format(**machine), caption_justify="left")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for title in ("runs", "first\ntoken, s", "prefill\ntok/s", "ms per\ntoken"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


def _cells(row: dict[str, Any]) -> "Iterator[str]":
    yield f"{row['length']:,}"
    yield row["method"]
    yield str(row["runs"])
    yield f"{row['first_token_s']['p50']:,.2f}"
    yield f"{row['prefill_tokens_per_s']:,.1f}"
    yield f"{row['ms_per_token']['p50']:,.1f}"
