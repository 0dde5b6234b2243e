"""Decode steps on a GPU as CUDA graphs: a layer is one launch, or two and its attention.

A layer of a decode step is some sixty kernels of a few microseconds, and the host takes several times longer to launch
them than the device to run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenselect.integrations.steady import SteadyLayer, SteadyPass

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Shared:
    """What the graphs of a model's layers share.

    They use the same memory one after the other, so only one layer runs at a time.
    """

    lock: Any = field(default_factory=RLock)
    pool: Any = None
    side: Any = None  # the stream on which graphs are recorded

    def prepare(self, device: torch.device) -> None:
        """Make the pool and the stream on first use."""
        if self.side is None:
            cuda: Any = torch.cuda
            self.pool, self.side = cuda.graph_pool_handle(), cuda.Stream(device)


class _Cut:
    """Stands for a cache's layer while a program is captured: one graph ends at its attention, another one begins."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.begin, self.end = begin, end

    def update(self, key: Tensor, value: Tensor) -> None:
        self.states = key, value

    def attend(self, query: Tensor, *extras: Any) -> Tensor:
        self.end()
        self.query, self.extras = query, extras
        self.out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        self.begin()
        return self.out


class Captured:
    """A layer's program as CUDA graphs, made when it runs for the second time.

    A steady step (see `steady`) is one graph, any other two, around an attention that is launched as ever.

    Args:
        bound: the program with the weights of a layer.
        shared: by all layers of the model.
    """

    def __init__(self, bound: Any, shared: Shared) -> None:
        self.bound, self.shared = bound, shared
        self.hooks = bound.hooks
        self._places = [part.data_ptr() for part in bound.inputs]
        self._runs = 0
        self._around: _Around | None = None
        self._whole: _Whole | None = None

    def serves(self, bound: Any) -> bool:
        """Whether another binding of the program has the very same weights."""
        same = bound.run == self.bound.run and len(bound.inputs) == len(self.bound.inputs)
        pairs = zip(bound.inputs, self.bound.inputs, self._places, strict=False)
        return same and all(a is b and a.data_ptr() == place for a, b, place in pairs)

    def __call__(self, hidden: Tensor, cache_layer: Any) -> Any:
        """What the program returns."""
        with self.shared.lock:
            if isinstance(cache_layer.owner.plan, SteadyPass):
                return self._steady_step(cache_layer.owner.plan, hidden, cache_layer)
            self._runs += 1
            if self._runs == 2:
                self._around = _try(lambda: _Around(self.bound, hidden, self.shared))
            around = self._around if self._runs > 1 else None
            return (around if around and around.is_here() else self.bound)(hidden, cache_layer)

    def _steady_step(self, plan: SteadyPass, hidden: Tensor, cache_layer: Any) -> Any:
        stand_in = plan.layer(cache_layer)
        whole = self._whole
        if whole is None or not whole.serves(stand_in):
            result = self.bound(hidden, stand_in)  # the first step there compiles what a graph cannot
            self._whole = _Whole(stand_in)
        else:
            result = whole(self.bound, hidden, stand_in, self.shared)
        stand_in.count()
        return result


def _try(capture: Callable[[], _T]) -> _T | None:
    """What was captured; None where that failed, which it does in many ways."""
    try:
        return capture()
    except Exception as error:
        _log.info("a layer is launched kernel by kernel: %s", error)
        return None


class _Recorder:
    """Records graphs one after the other on a stream of its own."""

    def __init__(self, shared: Shared, device: torch.device) -> None:
        shared.prepare(device)
        self.shared, self.stream = shared, torch.cuda.current_stream(device)
        self.graphs: list[Any] = []
        self._is_open = False

    def begin(self) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        self.graphs[-1].capture_begin(pool=self.shared.pool, capture_error_mode="thread_local")
        self._is_open = True

    def end(self) -> None:
        self._is_open = False
        self.graphs[-1].capture_end()

    def record(self, bound: Any, hidden: Tensor, cache_layer: Any) -> Tensor:
        """Let a program run while it is recorded."""
        torch.cuda.synchronize(hidden.device)
        with torch.cuda.stream(self.shared.side):
            self.begin()
            try:
                result = bound(hidden, cache_layer)
            finally:
                if self._is_open:
                    self.end()
        if not isinstance(result, Tensor):
            raise TypeError(f"it returns {type(result).__name__}")
        return result

    def is_here(self) -> bool:
        """Whether work is launched where it was when this was made."""
        return bool(torch.cuda.current_stream(self.stream.device) == self.stream)


class _Around:
    """Two graphs: what comes before an attention, and what comes after it."""

    def __init__(self, bound: Any, hidden: Tensor, shared: Shared) -> None:
        self.recorder = _Recorder(shared, hidden.device)
        self.hidden, self.cut = hidden.clone(), _Cut(self.recorder.begin, self.recorder.end)
        self.result = self.recorder.record(bound, self.hidden, self.cut)
        self.is_here = self.recorder.is_here

    def __call__(self, hidden: Tensor, cache_layer: Any) -> Tensor:
        before, after = self.recorder.graphs
        self.hidden.copy_(hidden)
        before.replay()
        cache_layer.update(*self.cut.states)
        self.cut.out.copy_(cache_layer.attend(self.cut.query, *self.cut.extras))
        after.replay()
        return self.result.clone()  # ours is written again by the next step


class _Whole:
    """One graph: a layer with the attention of a steady step, for a cache at one place, which it does not keep."""

    def __init__(self, stand_in: SteadyLayer) -> None:
        self.place, self.tables = stand_in.place(), stand_in.tables
        self.recorder: _Recorder | None = None
        self.has_failed = False

    def serves(self, stand_in: SteadyLayer) -> bool:
        """Whether the graph reads and writes what this step must."""
        return self.place == stand_in.place() and self.tables is stand_in.tables

    def __call__(self, bound: Any, hidden: Tensor, stand_in: SteadyLayer, shared: Shared) -> Any:
        if self.recorder is None and not self.has_failed:
            self.has_failed = _try(lambda: self._record(bound, hidden, stand_in, shared)) is None
        if self.recorder is None or not self.recorder.is_here():
            return bound(hidden, stand_in)
        self.hidden.copy_(hidden)
        self.recorder.graphs[0].replay()
        return self.result.clone()

    def _record(self, bound: Any, hidden: Tensor, stand_in: SteadyLayer, shared: Shared) -> bool:
        recorder = _Recorder(shared, hidden.device)
        self.hidden = hidden.clone()
        self.result = recorder.record(bound, self.hidden, stand_in)
        self.recorder = recorder
        return True
