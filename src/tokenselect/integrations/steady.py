"""A decode step that selects, in a form that a CUDA graph can hold: everything that changes lies on the device.

Of one sequence beyond the budget every step attends as many tokens, and the grids of scoring may be as large as the
cache. What is left is a few numbers and the distances of runs of keys, which all layers share; they are written once a
step. Selections are those of `selection.select_tokens` up to the rounding of votes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

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
        capacity: tokens that the cache has room for.
    """

    def __init__(self, config: TokenSelectConfig, table: RotaryTable, max_distance: int, capacity: int) -> None:
        self.config, self.table, self.max_distance, self.capacity = config, table, max_distance, capacity
        device = table.cos.device
        self.numbers = torch.zeros(9, dtype=torch.int64, device=device)
        self.slot, self.start_loc = self.numbers[0:1], self.numbers[1:3]
        self.candidates, self.block = self.numbers[3:5].view(1, 2), self.numbers[5:9]
        self.zero = torch.zeros(1, dtype=torch.int64, device=device)
        self.pages = PageTable(self.zero.view(1, 1), capacity, [0])
        self.num_attended = config.dense_limit + (0 if config.local_includes_block else 1)
        self.cos, self.sin = table.rotation(slice(config.budget), torch.float32)
        self.distances: list[Distances] = []
        if config.scoring in ("mix", "position_free"):
            self.distances.append(one_distance(1, config.num_local_tokens, table))
        if config.scoring in ("mix", "distance"):
            self.distances.append(self._runs(device))

    def _runs(self, device: torch.device) -> Distances:
        size = self.config.distance_bucket_size
        runs = torch.arange(-(-self.capacity // size), device=device)
        self.run_ends = -self.config.num_sink_tokens - runs * size - (size - 1)
        shape = len(runs), self.table.cos.shape[1]
        cos, sin = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        return Distances(cos, sin, size, torch.tensor([0, len(runs)], device=device), self.table.interleaved)

    def write(self, position: int) -> None:
        """Tell the device where the step's token stands."""
        config = self.config
        sinks = config.num_sink_tokens
        window = position + 1 - (self.num_attended - sinks - config.num_selected_tokens)
        values = [position, 0, window - sinks, sinks, window, 0, window, 0, self.num_attended]
        self.numbers.copy_(torch.tensor(values), non_blocking=True)
        if config.scoring != "position_free":
            view = self.distances[-1]
            nearest = (self.run_ends + position).clamp(min=0)
            made = mean_rotation(self.table.frequencies, nearest, view.run_size, self.max_distance)
            for into, part in zip((view.cos, view.sin), made, strict=True):
                into.copy_(part)


class SteadyPass:
    """The plan of a steady step; a layer that cannot be captured falls back to the ordinary one."""

    def __init__(self, tables: Tables, fallback: Callable[[], Any]) -> None:
        self.tables, self._make, self._ordinary = tables, fallback, None

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
        self.tables, self.layer, self.scored = tables, layer, layer.scored_rows()
        self.place = [(part.data_ptr(), part.shape, part.stride()) for part in layer.places()]

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write the token's key and value [1, Hkv, 1, D], and the key's int8 copy."""
        tables, key = self.tables, key[:, :, 0]
        integer_rows, scale_rows, center = self.scored
        gpu.move_rows(key, value[:, :, 0].to(key.dtype), tables.zero, tables.slot, *self.layer.rows())
        if scale_rows is not None and center is not None:
            integers, scales = gpu.quantize_rows(key, center[0])
            integer_rows.index_copy_(0, tables.slot, integers)
            scale_rows.index_copy_(0, tables.slot, scales)

    def attend(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention [1, 1, Hq, D] of a query [1, Hq, 1, D]."""
        from tokenselect.ops.gpu.around import slots_to_attend
        from tokenselect.ops.gpu.score import Spans, score_tokens

        tables, config = self.tables, self.tables.config
        flat = query[:, :, 0]
        spans = Spans([tables.capacity], [1], tables.capacity, tables.start_loc)
        keys, key_scales, center = self.scored
        votes, _ = score_tokens(
            flat, keys, tables.pages, tables.zero, tables.candidates, tables.distances,
            vote_scale(scale, tables.table, config), None, key_scales, center, spans,
        )  # fmt: skip
        chosen = gpu.topk_tokens(votes, tables.start_loc, config.num_selected_tokens)
        slots = slots_to_attend(chosen, tables.pages, tables.block, tables.num_attended, config.num_sink_tokens)
        keys, values, rows = self.layer.attended_rows(slots)
        starts = torch.tensor([0, 1]), rows, torch.tensor([0, tables.num_attended])
        out = gpu.sparse_attention(
            flat, keys, values, *starts, tables.cos, tables.sin, scale,
            interleaved=tables.table.interleaved, softcap=softcap, sink_logits=sinks,
        )  # fmt: skip
        return out[None]


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
        self.can = ops is gpu and plain and config.num_selected_tokens > 0
        self.lock = Lock()  # the tables are those of one step at a time
        self._tables: Tables | None = None

    def begin(
        self,
        layers: Sequence[Any],
        padding: list[int],
        position: int,
        known_length: int,
        table: RotaryTable,
        fallback: Callable[[], Any],
    ) -> SteadyPass | None:
        """The plan of a step of one token, with `lock` held; None: it is no such step.

        Args:
            layers: of the cache.
            padding: of each sequence.
            position: of the token.
            known_length: tokens that the context is known to have.
            table: rotations of the model.
            fallback: makes the ordinary plan.
        """
        ours = [layer for layer in layers if isinstance(layer, RawKeyLayer)]
        if not self.can or padding != [0] or self.config.covers(known_length, position):
            return None
        if not ours[0].owner.traced or not all(layer.takes_one_more() for layer in ours):
            return None
        if not self.lock.acquire(blocking=False):
            return None
        capacity = ours[0].capacity
        if self._tables is None or self._tables.table is not table or self._tables.capacity != capacity:
            self._tables = Tables(self.config, table, self.max_distance, capacity)
        self._tables.write(position)
        return SteadyPass(self._tables, fallback)
