"""Flags from dataclasses: a command's parameter that is a dataclass becomes one flag per field.

So names, defaults and help have one home each: `TokenSelectConfig`, `Sampling`, `ModelOptions`.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from tokenselect.config import TokenSelectConfig
from tokenselect.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, where and how it runs."""

    model: str | None = _flag(
        None, "folder, GGUF file, or name on the Hugging Face hub; default: the embedded SmolLM2-135M"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag("auto", "type of weights and cache")
    device: str = _flag("cpu", "torch device, such as cpu or cuda:0")
    threads: int | None = _flag(None, "CPU threads; default: what torch chooses")
    allow_pickle: bool = _flag(False, "also load weights that are pickles, which can run code")
    trust_remote_code: bool = _flag(False, "run Python code that comes with the model")

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise ValueError(f"--threads must be between 1 and 4096, got {self.threads}")


_GROUPS: tuple[Any, ...] = (TokenSelectConfig, Sampling, ModelOptions)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give typer a function with flags in place of dataclasses.

    Args:
        function: a command; of its parameters those annotated with a dataclass of `_GROUPS` are expanded.

    Returns:
        A function that builds the dataclasses from their flags and calls `function`.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in _GROUPS}
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in groups
    ]

    def call(**values: Any) -> None:
        built = {name: _build(cls, values) for name, cls in groups.items()}
        function(**built, **values)

    expanded = [parameter for cls in groups.values() for parameter in _parameters(cls)]
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = inspect.Signature([*own, *expanded])  # type: ignore[attr-defined]
    return call


def _build(cls: type, values: dict[str, Any]) -> Any:
    """Take a dataclass's flags out of `values`; those that were not given keep its defaults."""
    given = {item.name: values.pop(item.name) for item in fields(cls)}
    given = {name: value for name, value in given.items() if value is not None}
    if cls is TokenSelectConfig:
        return _base_config(values.pop("paper"), values.pop("config_file")).replace(**given)
    return cls(**given)


def _base_config(paper: bool, file: str | None) -> TokenSelectConfig:
    """What single flags change: a preset, a file, or the defaults."""
    if file is None:
        return TokenSelectConfig.paper() if paper else TokenSelectConfig()
    if paper:
        raise ValueError("pass --paper or --config, not both")
    text = read_text(file)
    try:
        return TokenSelectConfig.from_json(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_text(file: str) -> str:
    """A text file's content.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    return decode(Path(file).read_bytes(), file)


def decode(content: bytes, name: str) -> str:
    """Bytes as UTF-8 without a byte order mark.

    Raises:
        ValueError: they are not UTF-8; names the first wrong byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from None


def _parameters(cls: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(cls)
    assert is_dataclass(cls)
    # Only settings can come from a file, so only they need a way to be switched off.
    negated = cls is TokenSelectConfig
    for item in fields(cls):
        yield _parameter(item.name, hints[item.name], item.default, item.metadata["help"], negated)
    if cls is TokenSelectConfig:
        preset = typer.Option("--paper", help="start from the published settings")
        yield _make("paper", bool, preset, False)
        file = typer.Option("--config", metavar="FILE", help="start from the settings in a JSON file")
        yield _make("config_file", str | None, file, None)


def _parameter(name: str, hint: Any, default: Any, text: str, negated: bool) -> inspect.Parameter:
    """A flag that is None unless given, so that only the dataclass knows its default."""
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    kind = str if choices else _plain(hint)
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool and negated else flag,
        help=f"{text}{_shown(default, negated)}",
        show_default=False,
        metavar="|".join(choices) if choices else None,
        autocompletion=(lambda: choices) if choices else None,
    )
    return _make(name, kind | None, option, None)


def _make(name: str, hint: Any, option: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


def _plain(hint: Any) -> Any:
    """The type without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _shown(default: Any, negated: bool) -> str:
    if default is None or (default is False and not negated):
        return ""
    return f" [default: {('on' if default else 'off') if isinstance(default, bool) else default}]"
