"""What the commands share: load a model, show an answer while it is written."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

from tokenselect.cli.display import Display, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tokenselect.cli.flags import ModelOptions
    from tokenselect.config import TokenSelectConfig
    from tokenselect.llm import LLM
    from tokenselect.models import LoadedModel

METHOD_HELP = (
    "tokenselect; streaming: sinks and local tokens alone at the same budget; dense: the model as it is; others, to "
    "compare with: infllm, quest, snapkv, paper, published, streaming_same_window, ntk, yarn, self_extend"
)


def complete_method() -> list[str]:
    """Values of `--method`, for the shell's completion."""
    from tokenselect.methods import METHODS

    return list(METHODS)


def load(options: ModelOptions, display: Display) -> LoadedModel:
    """The model that the flags ask for."""
    with display.waiting("Loading"):
        import torch

        from tokenselect.models import load_model

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return load_model(
            options.model,
            dtype=options.dtype,
            device=options.device,
            allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code,
            progress=display.note,
        )


def load_llm(options: ModelOptions, method: str, config: TokenSelectConfig, display: Display) -> LLM:
    """The model that the flags ask for, with the method."""
    from tokenselect.methods import method_config

    method_config(method, config)  # refuse a wrong method before the model is loaded
    loaded = load(options, display)
    from tokenselect.llm import LLM

    return LLM(loaded, method, config)


def show(
    start: Callable[[Callable[[int, int], None]], Generator[str]], display: Display, echo: bool = True
) -> tuple[str, bool]:
    """Show an answer while it is written.

    Args:
        start: starts it, given what to call while the prompt is read.
        display: for the progress.
        echo: write the pieces to stdout.

    Returns:
        The text, and whether Ctrl-C ended it.
    """
    pieces: list[str] = []
    interrupted = False
    try:
        with Reading(display) as reading, closing(start(reading.update)) as stream:
            for piece in stream:
                reading.stop()
                pieces.append(piece)
                if echo:
                    write(piece)
    except KeyboardInterrupt:
        interrupted = True
    return "".join(pieces), interrupted


def write(text: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
