"""Room on Python's stack: calls at any depth find it, whatever was called before."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from tokenselect.integrations.room import with_room

_CALLS = 200


def faults(calls: Callable[[], None]) -> int:
    """Pages that the system had to give for these calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    calls()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def layer(depth: int = 3) -> None:
    if depth:
        layer(depth - 1)


def layers() -> None:
    for _ in range(_CALLS):
        layer()


def most_faults(calls: Callable[[], None]) -> int:
    """The most that any depth of the stack, up to a few of its chunks, costs."""
    most = 0

    def descend(depth: int) -> None:
        nonlocal most
        most = max(most, faults(calls))
        if depth:
            descend(depth - 1)

    descend(400)
    return most


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="only CPython's frames lie in chunks of 16 KB")
def test_calls_find_room_at_any_depth() -> None:
    assert most_faults(with_room(layers)) < _CALLS / 4
    if sys.version_info < (3, 15):  # otherwise the test would not see what it is about
        assert most_faults(layers) >= _CALLS


def test_it_is_the_same_function_for_who_calls_it() -> None:
    def divided(a: int, *, by: int) -> float:
        """A quotient."""
        return a / by

    roomy = with_room(divided)
    assert (roomy(3, by=2), roomy.__name__, roomy.__doc__) == (1.5, "divided", "A quotient.")
    with pytest.raises(ZeroDivisionError):
        roomy(1, by=0)
