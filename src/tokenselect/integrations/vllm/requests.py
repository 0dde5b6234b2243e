"""What a worker remembers of each request, as long as vLLM keeps the request."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.ragged import Stretch
from tokenselect.integrations.room import with_room
from tokenselect.integrations.vllm.settings import request_settings, wants_trace
from tokenselect.integrations.vllm.traces import RequestTrace, TraceFolder
from tokenselect.selection import SelectionState

# The requests of the forward pass that is being prepared, in the order of its rows.
_BATCH: ContextVar[Sequence[Any]] = ContextVar("batch", default=())


def current_requests() -> Sequence[Any]:
    """The requests of the forward pass that is being prepared; none in a dummy run."""
    return _BATCH.get()


def adapt_runner() -> None:
    """Let vLLM's model runner tell whose attention metadata it builds, and give what it runs room on Python's stack.

    The builders are told lengths only.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._build_attention_metadata
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _batch([self.requests[name] for name in self.input_batch.req_ids]):
            return original(self, *args, **kwargs)

    GPUModelRunner._build_attention_metadata = build
    GPUModelRunner.execute_model = with_room(GPUModelRunner.execute_model)


@contextmanager
def _batch(requests: Sequence[Any]) -> Iterator[None]:
    token = _BATCH.set(requests)
    try:
        yield
    finally:
        _BATCH.reset(token)


@dataclass(slots=True)
class RequestState:
    """One request on this worker.

    Attributes:
        name: vLLM's.
        row: its row in tables that have one per request.
        config: its settings.
        next_start: where the next forward pass begins, unless the request was preempted.
        copied: tokens that an int8 copy holds.
        has_center: whether that copy's center is known.
        layers: the Selection Cache, by layer name.
        num_selecting: queries that selected, and
        planned: the tokens that they attend per layer, of
        available: that there were.
        trace: where the request is traced.
    """

    name: str
    row: int
    config: TokenSelectConfig
    next_start: int = -1
    copied: int = 0
    has_center: bool = False
    layers: defaultdict[str, SelectionState] = field(default_factory=lambda: defaultdict(SelectionState))
    num_selecting: int = 0
    planned: int = 0
    available: int = 0
    trace: RequestTrace | None = None

    def begin(self, start: int, num_prompt_tokens: int) -> None:
        """A new request, or one that comes back after preemption: blocks are others, and what was selected is void."""
        for layer in self.layers.values():
            layer.forget()
        self.has_center = False
        # What a prefix-cache hit brings was copied by the request that computed it: prompts that are attended whole,
        # and other settings, share no blocks with this one (see the scheduler).
        is_copied = num_prompt_tokens > self.config.num_dense_tokens and start >= self.config.center_tokens
        self.copied = start if is_copied else 0

    def note(self, queries: int, attended: int, available: int) -> None:
        """Queries that select, the tokens that they are to attend and those that there are for them."""
        self.num_selecting += queries
        self.planned += attended
        self.available += available

    @property
    def attended(self) -> float:
        """Tokens attended per layer by the queries that selected; a selection that serves again reaches further."""
        layers = self.layers.values()
        return sum(layer.attended for layer in layers) / len(layers) if layers else self.planned


class RequestTable:
    """Requests by the object that vLLM keeps for each; gone when vLLM drops it.

    Args:
        config: the server's settings.
        traces: where traces may be kept; None: nowhere.
        on_leave: gets the state of each request that is gone.
    """

    def __init__(
        self, config: TokenSelectConfig, traces: TraceFolder | None, on_leave: Callable[[RequestState], None]
    ) -> None:
        self.config, self._traces = config, traces
        self._on_leave = on_leave
        self._states: dict[int, RequestState] = {}
        self._free: list[int] = []
        self.num_rows = 0

    def __len__(self) -> int:
        return len(self._states)

    def enter(self, request: Any, start: int, end: int) -> tuple[RequestState, Stretch]:
        """The state of a request whose tokens `start .. end - 1` go through the model now, and these tokens."""
        state = self._states.get(id(request)) or self._add(request)
        length = request.num_prompt_tokens
        if state.next_start != start:
            state.begin(start, length)
        state.next_start = end
        if state.trace is not None:
            state.trace.follow(request)
        # What the request wrote itself is read again after preemption: token by token, as it was written.
        tail = length - min(state.config.num_tail_tokens, length)
        return state, Stretch(start, end, tail, length)

    def _add(self, request: Any) -> RequestState:
        params = getattr(request, "sampling_params", None)
        row = self._free.pop() if self._free else self.num_rows
        self.num_rows = max(self.num_rows, row + 1)
        extra = getattr(params, "extra_args", None)
        state = RequestState(request.req_id, row, request_settings(self.config, extra))
        if self._traces is not None and wants_trace(self._traces.folder, extra):
            state.trace = self._traces.begin(request)
        self._states[id(request)] = state
        weakref.finalize(request, self._leave, id(request)).atexit = False
        return state

    def _leave(self, key: int) -> None:
        state = self._states.pop(key)
        self._free.append(state.row)
        if self._traces is not None and state.trace is not None:
            self._traces.keep(state.name, state.config, state.trace)
        self._on_leave(state)
