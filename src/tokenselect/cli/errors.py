"""What a user did wrong, in one sentence."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import fields

import typer

from tokenselect.config import TokenSelectConfig
from tokenselect.sampling import Sampling

_MISTAKES = (ValueError, TypeError, NotImplementedError, ImportError, OSError)
_USAGE: type[Exception] = typer.BadParameter.__mro__[2]  # click's own, wherever it lives
_NAMES = {item.name for cls in (TokenSelectConfig, Sampling) for item in fields(cls)} | {
    "allow_pickle",
    "trust_remote_code",
    "dtype",
    "method",
}
# What begins "... must be", and names that cannot be plain words anywhere.
_SETTING = re.compile(
    rf"^({'|'.join(_NAMES)})(?= must be)|\b({'|'.join(name for name in _NAMES if '_' in name)})\b(?:=True)?"
)


def failure(error: BaseException) -> int:
    """Tell an error on stderr.

    Args:
        error: what ended the command. With TOKENSELECT_DEBUG=1 in the environment it is raised again.

    Returns:
        The exit code.

    Raises:
        BaseException: `error`, if it is nobody's mistake but ours.
    """
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return 1
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130
    sentence = _sentence(error)
    if sentence is None or os.environ.get("TOKENSELECT_DEBUG") == "1":
        raise error
    print(f"Error: {sentence}", file=sys.stderr)
    return 2


def _sentence(error: BaseException) -> str | None:
    """None for what no user can cause."""
    if isinstance(error, _USAGE):
        return _one_line(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return "not enough memory; shorten the document, close other programs or use a smaller model"
    if isinstance(error, _MISTAKES) or type(error).__name__ == "BackendUnavailable":
        return _as_flags(_one_line(_text(error)))
    return None


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _as_flags(text: str) -> str:
    """Name the flags, not the settings of the library."""
    return _SETTING.sub(lambda match: f"--{(match[1] or match[2]).replace('_', '-')}", text)


def _close_stdout() -> None:
    """The interpreter flushes stdout once more when it ends: let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
