"""Rotary position embedding (RoPE) at any position, taken from the host model's own module.

The host's rotary module gives the tables, and what its attention layers do to queries tells the layout; so every
scaling type, partial rotation and pairing that the host knows is covered, and an unknown one is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenselect.ops.reference import rotate


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Rotations for the positions `0 .. length - 1`.

    Attributes:
        cos: [length, rotary_dim / 2] float32, without the attention factor.
        sin: same shape.
        interleaved: dimension pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        attention_factor: what the model multiplies rotated queries and keys with (YaRN, longrope), else 1.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    attention_factor: float

    def __len__(self) -> int:
        return self.cos.shape[0]

    @property
    def frequencies(self) -> Tensor:
        """[rotary_dim / 2] float64: radians per position."""
        return torch.atan2(self.sin[1].double(), self.cos[1].double())

    def rotation(self, positions: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions`, attention factor included, each [len(positions), rotary_dim / 2]."""
        factor = self.attention_factor
        return (self.cos[positions] * factor).to(dtype), (self.sin[positions] * factor).to(dtype)


def mean_rotation(frequencies: Tensor, nearest: Tensor, size: int, max_distance: int) -> tuple[Tensor, Tensor]:
    """The average of the rotations by `nearest, nearest + 1, ..., nearest + size - 1`.

    The mean of `size` equally spaced rotations is the rotation by their middle, shortened by a factor per frequency.

    Args:
        frequencies: [rotary_dim / 2] radians per position.
        nearest: [buckets] smallest distance of each bucket, in tokens; middles are clipped at `max_distance`.
        size: distances per bucket.
        max_distance: largest middle.

    Returns:
        Cosines and sines, each [buckets, rotary_dim / 2] float32.

    Source: method.md, section 5 (distance buckets).
    """
    middle = (nearest.double() + (size - 1) / 2).clamp(max=max_distance)
    half_step = frequencies.double() / 2
    shorten = torch.where(
        half_step.abs() < 1e-9,
        1.0,
        torch.sin(half_step * size) / (size * torch.sin(half_step).clamp(min=1e-12)),
    )
    angle = middle[:, None] * frequencies.double()
    return (angle.cos() * shorten).float(), (angle.sin() * shorten).float()


class HostRotary:
    """The rotary embedding of one kind of layer of a host model.

    Args:
        module: the host's rotary module, called as `module(x, position_ids[, layer_type])`; it is copied.
        max_length: positions that will be asked for at the most.
        layer_type: passed to `module` where the host has one embedding per layer type.
    """

    def __init__(self, module: nn.Module, max_length: int, layer_type: str | None = None) -> None:
        self._module = copy.deepcopy(module).float()  # longrope and dynamic modules change when they are called
        self._extra: dict[str, Any] = {"layer_type": layer_type} if layer_type else {}
        self._max_length = max_length
        self._reader: _Reader | None = None
        # longrope has one table up to the original window and another one beyond it
        self._switch = _longrope_switch(module, layer_type)
        self._tables: dict[bool, RotaryTable] = {}

    def learn_layout(self, raw: Tensor, rotated: Tensor) -> None:
        """Find out, or confirm, how the host pairs dimensions.

        Args:
            raw: [..., T, head_dim] queries before rotation.
            rotated: the same at the positions `0 .. T - 1`, rotated by the host with `host_tables`.

        Raises:
            NotImplementedError: neither the half nor the interleaved layout, or another one than before.
        """
        cos, sin = (part[0] for part in self.host_tables(raw.shape[-2]))
        # in half precision the host rounds more; a wrong layout is wrong by the size of the query
        tolerance = 1e-4 if rotated.dtype == torch.float32 else 0.1
        for reader in [self._reader] if self._reader else _readers():
            c, s = reader(cos), reader(sin)
            if 2 * c.shape[-1] > raw.shape[-1]:
                continue
            ours = rotate(raw.float(), c, s, reader.interleaved)
            if (ours - rotated.float()).norm() <= tolerance * rotated.float().norm():
                self._reader = reader
                return
        raise NotImplementedError("a rotary embedding that is neither the half nor the interleaved layout")

    def table(self, length: int) -> RotaryTable:
        """The table for a query that attends `length` tokens, the same object for all lengths that share it."""
        beyond = self._switch is not None and length > self._switch
        if beyond not in self._tables:
            size = self._max_length if beyond or self._switch is None else min(self._switch, self._max_length)
            self._tables[beyond] = self._make(size)
        return self._tables[beyond]

    def identity(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A `position_embeddings` pair that leaves queries and keys as they are."""
        one = torch.ones_like(self.host_tables(1)[0], dtype=dtype)
        return one, torch.zeros_like(one)

    @torch.no_grad()
    def host_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """The host's own cosines and sines for the positions `0 .. length - 1`, float32."""
        device = next((buffer.device for buffer in self._module.buffers()), torch.device("cpu"))
        positions = torch.arange(length, device=device)[None]
        tables = self._module(torch.zeros(1, 1, 1, device=device), positions, **self._extra)
        if not isinstance(tables, tuple) or len(tables) != 2:
            raise NotImplementedError("a rotary embedding that is not a pair of cosines and sines")
        cos, sin = tables
        return cos, sin

    def _make(self, length: int) -> RotaryTable:
        if self._reader is None:
            raise RuntimeError("learn_layout() must come first")
        cos, sin = (self._reader(part[0]) for part in self.host_tables(length))
        factor = float(cos[0].mean())  # cos(0) = 1, so what is left is the attention factor
        return RotaryTable(cos / factor, sin / factor, self._reader.interleaved, factor)


@dataclass(frozen=True, slots=True)
class _Reader:
    """How to read one angle per pair from the host's table, and how the host pairs dimensions."""

    interleaved: bool
    step: int  # the host's table holds each angle `step` times: 1, or 2
    adjacent: bool  # ... next to each other, or half a table apart

    def __call__(self, table: Tensor) -> Tensor:
        if self.step == 1:
            return table
        return table[..., 0::2] if self.adjacent else table[..., : table.shape[-1] // 2]


def _readers() -> Iterator[_Reader]:
    for interleaved in (False, True):
        yield _Reader(interleaved, 2, interleaved)
        yield _Reader(interleaved, 2, not interleaved)
        yield _Reader(interleaved, 1, False)


def _longrope_switch(module: nn.Module, layer_type: str | None) -> int | None:
    config: Any = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_type and isinstance(parameters.get(layer_type), dict):
        parameters = parameters[layer_type]
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
