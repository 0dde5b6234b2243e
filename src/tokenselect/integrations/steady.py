"""A decode step that selects, in a form that a CUDA graph can hold: everything that changes lies on the device.

Of sequences beyond the budget every step attends as many tokens, and the grids of scoring may be as large as the
cache. What is left is a few numbers and the distances of runs of keys, which all layers share; they are written once a
step. With the Selection Cache each layer finds out on the device which sequences its last selection serves: these
attend at once while the others select. Selections are those of `selection.select_tokens` up to the rounding of votes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tokenselect.cache import RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.distances import has_one_distance, has_runs, num_clipped, one_distance, run_rotations
from tokenselect.integrations.remembered import Attended, Remembered
from tokenselect.ops import Backend, gpu
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances
from tokenselect.rotary import RotaryTable
from tokenselect.selection import vote_scale

if TYPE_CHECKING:
    from tokenselect.ops.gpu.attention import Last


class Tables:
    """What the layers of a step share, written anew for each step.

    Args:
        config: the settings.
        table: rotations of the model.
        max_distance: largest distance for scoring.
        cache: shape [B, Hkv, capacity, D] of keys.
        padding: rows before each sequence's first token.
    """

    def __init__(
        self, config: TokenSelectConfig, table: RotaryTable, max_distance: int, cache: Sequence[int], padding: list[int]
    ) -> None:
        self.config, self.table, self.max_distance = config, table, max_distance
        self.cache, self.padding, (batch, heads, self.capacity, _) = tuple(cache), padding, cache
        device, sinks, k = table.cos.device, config.num_sink_tokens, config.num_selected_tokens
        self.sequences = torch.arange(batch, device=device)
        self.pages = PageTable(self.sequences[:, None] * heads, self.capacity, padding)
        self.selected = slice(sinks, sinks + k)  # of the slots that a sequence attends
        self.num_own = 0 if config.local_includes_block else 1
        self.num_attended = config.dense_limit + self.num_own
        self.num_slots = max(self.num_attended, sinks + k + 2 * config.num_local_tokens * config.reuse)
        self.numbers = torch.zeros(9 * batch + 2, dtype=torch.int64, device=device)
        sizes = [1, batch, batch, batch + 1, 2 * batch, 4 * batch]
        parts = cast("tuple[Tensor, ...]", cast("Any", self.numbers).split(sizes))
        self.column, self.positions, self.written, self.start_loc, candidates, bounds = parts
        self.candidates = candidates.view(batch, 2)
        first = self.sequences[:, None] * heads * self.capacity + torch.tensor(padding, device=device)[:, None]
        self.first_candidate = (first + sinks).flatten()
        self.attended = Attended(first + torch.arange(self.num_slots, device=device), bounds)
        self.ages = torch.arange(sinks + k + 1 - self.num_attended, 1, device=device)  # of the local window's tokens
        cuda: Any = torch.cuda
        self.aside = cuda.Stream(device) if device.type == "cuda" else None  # for what need not be waited for
        self.cos, self.sin = table.rotation(slice(config.budget), torch.float32)
        self.distances: list[Distances] = []
        if has_one_distance(config):
            self.distances.append(one_distance(batch, config.num_local_tokens, table))
        if has_runs(config):
            self.distances.append(self._runs(device))

    def _runs(self, device: torch.device) -> Distances:
        size = self.config.distance_bucket_size
        runs = torch.arange(-(-self.capacity // size), device=device)
        self.run_ends = -self.config.num_sink_tokens - runs * size - (size - 1)
        shape = len(self.sequences) * len(runs), self.table.cos.shape[1]
        cos, sin = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        start_loc = torch.arange(len(self.sequences) + 1, device=device) * len(runs)
        return Distances(cos, sin, size, start_loc, self.table.interleaved, torch.zeros_like(self.sequences))

    def write(self, column: int) -> None:
        """Tell the device where the step's tokens stand, padding counted."""
        (batch, heads, capacity, _), sinks = self.cache, self.config.num_sink_tokens
        recent = self.num_attended - sinks - self.config.num_selected_tokens
        positions = [column - pad for pad in self.padding]
        windows = [position + 1 - recent for position in positions]
        values = [column, *positions, *(i * heads * capacity + column for i in range(batch))]
        values += accumulate((window - sinks for window in windows), initial=0)
        values += [at for window in windows for at in (sinks, window)]
        values += [at for i in range(batch) for at in (i, 1, i * self.num_slots, self.num_attended)]
        self.numbers.copy_(torch.tensor(values), non_blocking=True)
        if not self.config.reuse:  # else every layer has slots of its own
            self.attended.slots[:, self.selected.stop :] = self.written[:, None] + self.ages
        if has_runs(self.config):
            view = self.distances[-1]
            nearest = (self.run_ends + self.positions[:, None]).clamp(min=0).flatten()
            made = run_rotations(nearest, self.config, self.max_distance, self.table)
            for into, part in zip((view.cos, view.sin), made, strict=True):
                into.copy_(part)
            assert view.alike is not None
            farthest = self.positions + self.run_ends[0]
            view.alike.copy_(num_clipped(farthest, view.run_size, self.max_distance))


class SteadyPass:
    """The plan of a steady step; a layer that cannot be captured falls back to the ordinary one."""

    def __init__(self, tables: Tables, fallback: Callable[[], Any], end: Callable[[], None]) -> None:
        self.tables, self._make, self.end = tables, fallback, end
        self._ordinary: Any = None

    def attend(self, *args: Any) -> Any:
        """As `Pass.attend`, for a layer that wrote its tokens itself."""
        if self._ordinary is None:
            self._ordinary = self._make()
        return self._ordinary.attend(*args)

    def layer(self, layer: RawKeyLayer) -> SteadyLayer:
        """What stands for a cache's layer in this step."""
        return SteadyLayer(self.tables, layer)


class SteadyLayer:
    """Stands for a cache's layer: writes one token and attends, without asking the host for anything."""

    def __init__(self, tables: Tables, layer: RawKeyLayer) -> None:
        self.tables, self.layer = tables, layer
        self.remembered: Remembered | None = None
        if tables.config.reuse:
            make = partial(Remembered, num_slots=tables.num_slots, selected=tables.selected, device=layer.device)
            self.remembered = layer.remembered(tables.padding, make)

    def place(self) -> list[int]:
        """Where everything lies that a step reads and writes; its shapes follow from the tables."""
        return [part.data_ptr() for part in self.layer.places()]

    def count(self) -> None:
        """Note that a step was made."""
        tables = self.tables
        self.layer.count_one(None if tables.config.reuse else tables.num_attended, tables.padding)

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write the tokens' keys and values [B, Hkv, 1, D], and the keys' int8 copy."""
        tables, key = self.tables, key[:, :, 0]
        gpu.move_rows(key, value[:, :, 0].to(key.dtype), tables.sequences, tables.written, *self.layer.rows())
        if (copy := self.layer.int8_copy) is not None:
            alone = key.shape[0] == 1
            made = gpu.quantize_rows(key, copy.center[0]) if alone else gpu.quantize_rows(key.float() - copy.center)
            for into, part in zip((copy.integers, copy.scales), made, strict=True):
                into.index_copy_(2, tables.column, part[:, :, None])

    def attend(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention [B, 1, Hq, D] of queries [B, Hq, 1, D]."""
        flat, tables = query[:, :, 0], self.tables
        out = torch.empty_like(flat, memory_format=torch.contiguous_format)
        attended = self._decide(flat)
        extras = {"interleaved": tables.table.interleaved, "softcap": softcap, "sink_logits": sinks}
        attend = partial(self._attend, attended, flat, scale, out, **extras)
        if attended.served is None or self.layer.fetches_rows or tables.aside is None:
            self._select(attended, flat, scale)
            attend(is_settled=True)
        else:  # who is served does not wait for who selects, nor for kernels that find nothing to do
            here = torch.cuda.current_stream(flat.device)
            tables.aside.wait_stream(here)
            with torch.cuda.stream(tables.aside):
                self._select(attended, flat, scale)
                attend(served=attended.served, is_settled=True)
            attend(served=attended.served, last=self._last())
            here.wait_stream(tables.aside)
        return out[:, None]

    def _decide(self, queries: Tensor) -> Attended:
        """What is attended, but for the tokens that must be selected anew."""
        from tokenselect.ops.gpu.reuse import decide_reuse

        tables, config, last = self.tables, self.tables.config, self.remembered
        if last is None:
            return tables.attended
        decide_reuse(
            queries, last.last_queries(queries), last.numbers, tables.positions, last.first,
            last.attended.slots, last.attended.bounds,
            num_sinks=config.num_sink_tokens, num_local=config.num_local_tokens, num_own=tables.num_own,
            num_selected=config.num_selected_tokens, threshold=config.reuse_threshold,
            parts=tables.cache[1] if config.reuse_test == "group_min" else 1,
        )  # fmt: skip
        return last.attended

    def _select(self, attended: Attended, queries: Tensor, scale: float) -> None:
        """Let those select that must, into the slots that are attended."""
        from tokenselect.ops.gpu.score import Spans, score_tokens
        from tokenselect.ops.gpu.topk import Maxima, topk_tokens

        tables, config, (batch, _, capacity, _) = self.tables, self.tables.config, self.tables.cache
        spans = Spans([capacity] * batch, [1] * batch, batch * capacity, tables.start_loc)
        keys, key_scales, center = self.layer.scored_rows()
        maxima = Maxima.of(batch, config.num_selected_tokens, queries.device)
        votes, _ = score_tokens(
            queries, keys, tables.pages, tables.sequences, tables.candidates, tables.distances,
            vote_scale(scale, tables.table, config), None, key_scales, center, config.vote_horizon,
            config.vote_prior, spans, attended.served, maxima,
            is_settled=True,
        )  # fmt: skip
        topk_tokens(
            votes, tables.start_loc, config.num_selected_tokens, capacity,
            into=attended.slots[:, tables.selected], firsts=tables.first_candidate, served=attended.served,
            maxima=maxima,
        )  # fmt: skip

    def _last(self) -> Last:
        from tokenselect.ops.gpu.attention import Last

        tables, last = self.tables, self.remembered
        assert last is not None
        return Last(last.numbers, tables.positions, last.first, tables.selected.stop, tables.num_slots)

    def _attend(self, attended: Attended, queries: Tensor, scale: float, out: Tensor, **options: Any) -> None:
        from tokenselect.ops.gpu.attention import attend_steps

        tables = self.tables
        keys, values, rows = self.layer.attended_rows(attended.slots.flatten())
        rotation = tables.cos, tables.sin, scale
        attend_steps(
            queries, keys, values, rows, attended.bounds, tables.num_slots, *rotation, out, **options
        )  # fmt: skip


class SteadySteps:
    """Says which decode steps can be captured whole, and keeps what they share.

    Args:
        config: the settings.
        ops: the backend.
        max_distance: largest distance for scoring.
    """

    def __init__(self, config: TokenSelectConfig, ops: Backend, max_distance: int) -> None:
        self.config, self.max_distance = config, max_distance
        plain = not (config.head_weights or config.smoothing_window > 1)
        backend: Any = ops
        self.can = backend is gpu and plain and config.num_selected_tokens > 0
        self._lock = Lock()  # the tables are those of one step at a time
        self._tables: Tables | None = None

    def begin(
        self,
        layers: Sequence[Any],
        padding: list[int],
        column: int,
        known_length: int,
        table: RotaryTable,
        fallback: Callable[[], Any],
    ) -> SteadyPass | None:
        """The plan of a step of one token of each sequence, which must be ended; None: it is no such step.

        Args:
            layers: of the cache.
            padding: of each sequence.
            column: where the tokens stand, padding counted.
            known_length: tokens that the context is known to have, padding counted.
            table: rotations of the model.
            fallback: makes the ordinary plan.
        """
        if not self.can or any(self.config.covers(known_length - pad, column - pad) for pad in padding):
            return None
        ours = [layer for layer in layers if isinstance(layer, RawKeyLayer)]
        if not ours[0].owner.traced or not all(layer.takes_one_more(padding) for layer in ours):
            return None
        caches = {(layer.device, *layer.cache_shape) for layer in ours}
        if caches != {(table.cos.device, *ours[0].cache_shape)} or not self._lock.acquire(blocking=False):
            return None
        try:
            tables = self._tables_for(table, ours[0].cache_shape, padding)
            tables.write(column)
        except BaseException:
            self._lock.release()
            raise
        return SteadyPass(tables, fallback, self._lock.release)

    def _tables_for(self, table: RotaryTable, shape: tuple[int, ...], padding: list[int]) -> Tables:
        known = self._tables
        if known is None or known.table is not table or known.cache != shape or known.padding != padding:
            known = self._tables = Tables(self.config, table, self.max_distance, shape, padding)
        return known
