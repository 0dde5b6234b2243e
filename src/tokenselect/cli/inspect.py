"""`tokenselect inspect`: what was read for an answer."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions
from tokenselect.cli.generate import join, read_document
from tokenselect.cli.session import load, show, write
from tokenselect.config import TokenSelectConfig
from tokenselect.sampling import Sampling

if TYPE_CHECKING:
    from tokenselect.llm import Prompt
    from tokenselect.trace import Trace


def inspect(
    model: ModelOptions,
    sampling: Sampling,
    config: TokenSelectConfig,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="question, read after the document")] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="document; default: standard input")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="document, empty line and prompt as they are, without the chat template"),
    ] = False,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="show this trace, which --save wrote, instead of asking a model")
    ] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="keep the trace in a file (.npz)")] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="the page")] = "inspect.html",
    find: Annotated[str | None, typer.Option(metavar="TEXT", help="mark this text on the page")] = None,
    as_text: Annotated[bool, typer.Option("--text", help="passages in the terminal instead of a page")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a page")] = False,
    passages: Annotated[int, typer.Option(help="most passages in text and JSON")] = 5,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the result, and errors")] = False,
) -> None:
    """Answer a question about a document and show what was read for every token of the answer.

    Writes a page that any browser opens by itself; records while it writes, which takes longer than `generate`.
    """
    if passages < 1:
        raise ValueError(f"--passages must be >= 1, got {passages}")
    display = Display(quiet)
    interrupted = False
    if trace is not None:
        found = _load(trace, prompt, file)
    else:
        text = join(read_document(file), prompt, needs_prompt=not raw)
        asked: Prompt = text if raw else [{"role": "user", "content": text}]
        found, interrupted = _ask(model, sampling, config, asked, display)
    if save is not None:
        from tokenselect.trace import save_trace

        save_trace(found, save)
        display.note(f"the trace is in {save}")
    _show(found, output, find, passages, as_text, as_json)
    if interrupted:
        raise typer.Exit(130)


def _load(trace: str, prompt: str | None, file: str | None) -> "Trace":
    if prompt is not None or file is not None:
        raise ValueError("--trace shows what was recorded before: leave --prompt and --file out")
    from tokenselect.trace import load_trace

    return load_trace(trace)


def _ask(
    model: ModelOptions, sampling: Sampling, config: TokenSelectConfig, asked: "Prompt", display: Display
) -> "tuple[Trace, bool]":
    loaded = load(model, display)
    from tokenselect.llm import LLM

    llm = LLM(loaded, config=config, trace=True)
    options: Any = asdict(sampling)
    _, interrupted = show(lambda on_prefill: llm.stream(asked, on_prefill=on_prefill, **options), display, echo=False)
    assert llm.stats is not None
    assert llm.trace is not None
    display.numbers(llm.stats)
    return llm.trace, interrupted


def _show(trace: "Trace", output: str, find: str | None, passages: int, as_text: bool, as_json: bool) -> None:
    from tokenselect import inspect

    if as_json:
        write(json.dumps(inspect.as_dict(trace, passages), indent=2) + "\n")
    elif as_text:
        write(inspect.as_text(trace, passages) + "\n")
    else:
        inspect.write_page(trace, Path(output), find)
        write(f"{output}\n")
