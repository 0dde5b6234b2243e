"""Room on Python's own stack, so that no layer's calls wait for the system's memory.

CPython (3.11 and later) keeps frames in chunks of 16 KB, which it takes from the system when a call does not fit and
gives back when that call returns. Where the end of a chunk happens to lie between a model and what its layers call,
every layer does so again, and the other threads of a forward pass are interrupted each time to forget the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Words. A frame as large as this gets a chunk of twice its size, of which what it calls may use the other half, 64 KB.
_FRAME = 1 << 13


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called where the frames of all that it calls find room."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=_FRAME)
    return update_wrapper(call, function)
