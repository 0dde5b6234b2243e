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
    is_on = [True]  # somebody may put another one before ours, and ours is left first

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs) if is_on else original(*args, **kwargs)

    def undo() -> None:
        is_on.clear()
        if module.__dict__.get(name) is call:
            del module.__dict__[name]
            if had_own is not None:
                module.__dict__[name] = had_own

    call.tokenselect_had_own = had_own  # type: ignore[attr-defined]
    module.__dict__[name] = call
    stack.callback(undo)


def own_of(module: nn.Module, name: str) -> Any:
    """What a user has put before a method of one object, below what `override` did; None: nothing."""
    found: Any = module.__dict__.get(name)
    while hasattr(found, "tokenselect_had_own"):
        found = found.tokenselect_had_own
    return found


def put_back(stack: ExitStack, rotary: nn.Module) -> None:
    """Undo what a dynamic embedding remembers of the longest input it has seen."""
    attributes, buffers = dict(rotary.__dict__), dict(rotary._buffers)

    def undo() -> None:
        rotary._buffers.update(buffers)
        rotary.__dict__.update(attributes)

    stack.callback(undo)
