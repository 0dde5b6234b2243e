"""Changes to a host's objects, undone by an `ExitStack`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


def override(stack: ExitStack, module: nn.Module, name: str, ours: Callable[..., Any]) -> None:
    """Put `ours(original, ...)` before a method of one object."""
    original = getattr(module, name)
    had_own = module.__dict__.get(name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    def undo() -> None:
        del module.__dict__[name]
        if had_own is not None:
            module.__dict__[name] = had_own

    module.__dict__[name] = call
    stack.callback(undo)


def put_back(stack: ExitStack, rotary: nn.Module) -> None:
    """Undo what a dynamic embedding remembers of the longest input it has seen."""
    attributes, buffers = dict(rotary.__dict__), dict(rotary._buffers)

    def undo() -> None:
        rotary._buffers.update(buffers)
        rotary.__dict__.update(attributes)

    stack.callback(undo)
