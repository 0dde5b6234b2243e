"""Rotations at positions that a table does not reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tokenselect.rotary import RotaryTable


def rotations(table: RotaryTable, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at any positions, attention factor included.

    Args:
        table: of the model.
        positions: [n] integers >= 0.

    Returns:
        Each [n, rotary_dim / 2] float32.
    """
    angle = positions.double()[:, None] * table.frequencies.to(positions.device)
    return (angle.cos() * table.attention_factor).float(), (angle.sin() * table.attention_factor).float()
