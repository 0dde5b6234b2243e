"""`tokenselect demo`: hidden facts in real documents, three methods side by side."""

import json
from typing import Annotated

import typer

from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions
from tokenselect.cli.session import load
from tokenselect.config import TokenSelectConfig


def demo(
    model: ModelOptions,
    config: TokenSelectConfig,
    context_length: Annotated[int, typer.Option(help="tokens of each document, question included")] = 16_000,
    questions: Annotated[int, typer.Option(help="documents, each with one fact at another depth")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 10,
    seed: Annotated[int, typer.Option(help="other documents and numbers")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="answers and numbers as one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the result, and errors")] = False,
) -> None:
    """Ask for facts in long real documents: TokenSelect, sinks + local tokens alone, dense attention."""
    if questions < 1 or context_length < 1 or not 0 <= seed < 2**31:
        raise ValueError("--questions and --context-length must be >= 1, --seed must be >= 0")
    display = Display(quiet)
    loaded = load(model, display)
    from tokenselect.demo import Demo

    run = Demo(loaded, config, display, to_stdout=not as_json)
    finished = run.run(context_length, questions, max_new_tokens, seed)
    if as_json:
        print(json.dumps(run.to_dict(), indent=2))
    else:
        run.print_table()
    if not finished:
        raise typer.Exit(130)
