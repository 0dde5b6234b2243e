"""`tokenselect chat`: several turns; each reads only what is new."""

import sys
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions
from tokenselect.cli.generate import join, read_document
from tokenselect.cli.session import METHOD_HELP, complete_method, load_llm, show, write
from tokenselect.config import TokenSelectConfig
from tokenselect.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenselect.llm import Conversation


def chat(
    model: ModelOptions,
    sampling: Sampling,
    config: TokenSelectConfig,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE", help="document, read with the first question"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="what the model is told first")] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP, autocompletion=complete_method)] = "tokenselect",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the answers, and errors")] = False,
) -> None:
    """Talk about a document: one question per line, the cache is kept between them.

    Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    display = Display(quiet)
    if file == "-":
        raise ValueError("standard input has the questions: pass the document as a file")
    document = None if file is None else read_document(file)
    llm = load_llm(model, method, config, display)
    options: Any = asdict(sampling)
    interrupted = False
    with llm.chat(system) as conversation:
        for question in _questions():
            asked = question if document is None else join(document, question)
            before = len(conversation.messages)
            interrupted = _turn(conversation, asked, options, display)
            if len(conversation.messages) > before:  # else it was interrupted before it was read
                document = None
    if interrupted and not sys.stdin.isatty():
        raise typer.Exit(130)


def _turn(conversation: "Conversation", asked: str, options: Any, display: Display) -> bool:
    """Whether Ctrl-C ended the answer."""
    _, interrupted = show(lambda on_prefill: conversation.stream(asked, on_prefill=on_prefill, **options), display)
    write("\n")
    if conversation.llm.stats is not None:
        display.numbers(conversation.llm.stats)
    return interrupted


def _questions() -> "Iterator[str]":
    """Lines of standard input that are not empty, until its end."""
    prompt = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        prompt = "> "
        with suppress(ImportError):
            import readline  # noqa: F401  (lets `input` edit lines)
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise ValueError("standard input is not UTF-8 text; convert it first") from None
        if line.strip():
            yield line
