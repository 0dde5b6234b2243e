"""The attention layers that are measured: heads and rotary embedding of three models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenselect.rotary import RotaryTable


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer of a model.

    Attributes:
        theta: base of its rotary embedding.
        window: positions that it was trained for.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    theta: float
    window: int

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return float(self.head_dim**-0.5)

    @property
    def max_distance(self) -> int:
        """Largest distance that scoring uses: what the integrations take by default."""
        return self.window * 7 // 8

    def rotary_table(self, length: int) -> RotaryTable:
        """Rotations of the positions `0 .. length - 1`."""
        half = self.head_dim // 2
        frequencies = self.theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(length)[:, None] * frequencies
        return RotaryTable(angle.cos().float(), angle.sin().float(), interleaved=False, attention_factor=1.0)


SHAPES = {
    "smollm2": Shape(9, 3, 64, 1e5, 8192),
    "qwen2-7b": Shape(28, 4, 128, 1e6, 32768),
    "llama-3-8b": Shape(32, 8, 128, 5e5, 8192),
}
