"""A backend around a backend that tells how long each operation takes."""

from __future__ import annotations

import time
from typing import Any

from tokenselect.ops import Backend


class TimedOps:
    """Adds up the seconds of each operation.

    Attributes:
        seconds: by operation, since it was last cleared.
    """

    def __init__(self, ops: Backend) -> None:
        self._ops = ops
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = operation(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return call
