"""A decode step that selects, in a form that a CUDA graph can hold: everything that changes lies on the device.

Of sequences beyond the budget every step attends as many tokens, and the grids of scoring may be as large as the
cache. What is left is a few numbers and the distances of runs of keys, which all layers share; they are written once a
step. Selections are those of `selection.select_tokens` up to the rounding of votes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from tokenselect.cache import RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.ops import Backend, gpu
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances
from tokenselect.rotary import RotaryTable, mean_rotation
from tokenselect.selection import one_distance, vote_scale


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
        device = table.cos.device
        self.sequences = torch.arange(batch, device=device)
        self.pages = PageTable(self.sequences[:, None] * heads, self.capacity, padding)
        self.num_attended = config.dense_limit + (0 if config.local_includes_block else 1)
        self.bounds = torch.arange(batch + 1), torch.arange(batch + 1) * self.num_attended
        self.numbers = torch.zeros(9 * batch + 2, dtype=torch.int64, device=device)
        sizes = [1, batch, batch, batch + 1, 2 * batch, 4 * batch]
        parts = cast("tuple[Tensor, ...]", cast("Any", self.numbers).split(sizes))
        self.column, self.positions, self.slots, self.start_loc, candidates, self.blocks = parts
        self.candidates = candidates.view(batch, 2)
        self.cos, self.sin = table.rotation(slice(config.budget), torch.float32)
        self.distances: list[Distances] = []
        if config.scoring in ("mix", "position_free"):
            self.distances.append(one_distance(batch, config.num_local_tokens, table))
        if config.scoring in ("mix", "distance"):
            self.distances.append(self._runs(device))

    def _runs(self, device: torch.device) -> Distances:
        size = self.config.distance_bucket_size
        runs = torch.arange(-(-self.capacity // size), device=device)
        self.run_ends = -self.config.num_sink_tokens - runs * size - (size - 1)
        shape = len(self.sequences) * len(runs), self.table.cos.shape[1]
        cos, sin = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        start_loc = torch.arange(len(self.sequences) + 1, device=device) * len(runs)
        return Distances(cos, sin, size, start_loc, self.table.interleaved)

    def write(self, column: int) -> None:
        """Tell the device where the step's tokens stand, padding counted."""
        (batch, heads, capacity, _), sinks = self.cache, self.config.num_sink_tokens
        recent = self.num_attended - sinks - self.config.num_selected_tokens
        positions = [column - pad for pad in self.padding]
        windows = [position + 1 - recent for position in positions]
        values = [column, *positions, *(i * heads * capacity + column for i in range(batch))]
        values += accumulate((window - sinks for window in windows), initial=0)
        values += [at for window in windows for at in (sinks, window)]
        n = self.num_attended
        values += [at for i, window in enumerate(windows) for at in (i, window, i * n, n)]
        self.numbers.copy_(torch.tensor(values), non_blocking=True)
        if self.config.scoring != "position_free":
            view = self.distances[-1]
            nearest = (self.run_ends + self.positions[:, None]).clamp(min=0).flatten()
            made = mean_rotation(self.table.frequencies, nearest, view.run_size, self.max_distance)
            for into, part in zip((view.cos, view.sin), made, strict=True):
                into.copy_(part)


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
        self.place = [(part.data_ptr(), part.shape) for part in layer.places()]

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write the tokens' keys and values [B, Hkv, 1, D], and the keys' int8 copy."""
        tables, key = self.tables, key[:, :, 0]
        gpu.move_rows(key, value[:, :, 0].to(key.dtype), tables.sequences, tables.slots, *self.layer.rows())
        if (copy := self.layer.int8_copy) is not None:
            alone = key.shape[0] == 1
            made = gpu.quantize_rows(key, copy.center[0]) if alone else gpu.quantize_rows(key.float() - copy.center)
            for into, part in zip((copy.integers, copy.scales), made, strict=True):
                into.index_copy_(2, tables.column, part[:, :, None])

    def attend(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention [B, 1, Hq, D] of queries [B, Hq, 1, D]."""
        from tokenselect.ops.gpu.around import slots_to_attend
        from tokenselect.ops.gpu.score import Spans, score_tokens
        from tokenselect.ops.gpu.topk import topk_tokens

        tables, config = self.tables, self.tables.config
        flat, (batch, _, capacity, _) = query[:, :, 0], tables.cache
        spans = Spans([capacity] * batch, [1] * batch, batch * capacity, tables.start_loc)
        keys, key_scales, center = self.layer.scored_rows()
        votes, _ = score_tokens(
            flat, keys, tables.pages, tables.sequences, tables.candidates, tables.distances,
            vote_scale(scale, tables.table, config), None, key_scales, center, spans,
        )  # fmt: skip
        chosen = topk_tokens(votes, tables.start_loc, config.num_selected_tokens, capacity)
        sizes = batch * tables.num_attended, config.num_sink_tokens, tables.num_attended
        slots = slots_to_attend(chosen, tables.pages, tables.blocks, *sizes)
        keys, values, rows = self.layer.attended_rows(slots)
        query_bounds, slot_bounds = tables.bounds
        out = gpu.sparse_attention(
            flat, keys, values, query_bounds, rows, slot_bounds, tables.cos, tables.sin, scale,
            interleaved=tables.table.interleaved, softcap=softcap, sink_logits=sinks,
        )  # fmt: skip
        return out[:, None]


class SteadySteps:
    """Says which decode steps can be captured whole, and keeps what they share.

    Args:
        config: the settings.
        ops: the backend.
        max_distance: largest distance for scoring.
    """

    def __init__(self, config: TokenSelectConfig, ops: Backend, max_distance: int) -> None:
        self.config, self.max_distance = config, max_distance
        plain = not (config.reuse or config.head_weights or config.smoothing_window > 1)
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
