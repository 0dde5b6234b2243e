"""`tokenselect generate`: one document, one question, one answer."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions, decode, read_text
from tokenselect.cli.session import METHOD_HELP, complete_method, load_llm, show, write
from tokenselect.config import TokenSelectConfig
from tokenselect.sampling import Sampling

if TYPE_CHECKING:
    from tokenselect.llm import Prompt


def generate(
    model: ModelOptions,
    sampling: Sampling,
    config: TokenSelectConfig,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="question, read after the document")] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="document; default: standard input")
    ] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP, autocompletion=complete_method)] = "tokenselect",
    raw: Annotated[
        bool,
        typer.Option("--raw", help="document, empty line and prompt as they are, without the chat template"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="answer and numbers as one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the answer, and errors")] = False,
) -> None:
    """Read a document, answer a question about it."""
    display = Display(quiet)
    text = join(read_document(file), prompt, needs_prompt=not raw)
    llm = load_llm(model, method, config, display)
    asked: Prompt = text if raw else [{"role": "user", "content": text}]
    options: Any = asdict(sampling)
    answer, interrupted = show(
        lambda on_prefill: llm.stream(asked, on_prefill=on_prefill, **options), display, echo=not as_json
    )
    assert llm.stats is not None
    if as_json:
        result = {"answer": answer, "interrupted": interrupted, "stats": llm.stats.to_dict()}
        write(json.dumps(result, indent=2))
    write("\n")
    display.numbers(llm.stats)
    if interrupted:
        raise typer.Exit(130)


def read_document(file: str | None) -> str:
    """The document from a file, or from standard input.

    Raises:
        ValueError: it is empty or not UTF-8, or nothing was piped in.
        OSError: it cannot be read.
    """
    if file is None and sys.stdin.isatty():
        raise ValueError("there is no document: pass --file FILE, or pipe it in")
    piped = file in (None, "-")
    name = "the document on standard input" if piped else str(file)
    text = decode(sys.stdin.buffer.read(), name) if piped else read_text(name)
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def join(document: str, prompt: str | None, needs_prompt: bool = True) -> str:
    """The document goes before the question.

    Raises:
        ValueError: the question is missing or empty.
    """
    if prompt is None and not needs_prompt:
        return document
    if prompt is None or not prompt.strip():
        raise ValueError("there is no question: pass --prompt TEXT")
    return f"{document}\n\n{prompt}"
