"""How far the keys stand when they are scored: the rotations of the vote's queries (method.md, section 5).

Scored as if just outside the local window, keys are found however far they are; scored at their distance, what a head
looks for near is found near. A logit with the mean of both rotations is the mean of both logits, so one query does it.
Scaled up to their sum, a head's share of the vote is as the product of both shares. The first may count more than once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.ops.reference import Distances
from tokenselect.rotary import RotaryTable, mean_rotation


def has_one_distance(config: TokenSelectConfig) -> bool:
    """Whether heads vote on keys that all stand at one distance."""
    return config.scoring in ("mix", "position_free")


def has_runs(config: TokenSelectConfig) -> bool:
    """Whether heads vote on runs of keys, each at its distance."""
    return config.scoring != "position_free"


def one_distance(num_blocks: int, distance: int, table: RotaryTable) -> Distances:
    """Every key as if it stood just outside the local window."""
    cos, sin = (part.float().expand(num_blocks, -1) for part in _rotation_by(distance, table.frequencies))
    return Distances(cos, sin, 1, torch.arange(num_blocks + 1, device=cos.device), table.interleaved)


def runs_of_keys(
    starts: Tensor, spans: Tensor, config: TokenSelectConfig, max_distance: int, table: RotaryTable
) -> Distances:
    """Runs of `config.distance_bucket_size` keys, each with the rotation of its distances to the block's start.

    Args:
        starts: [num_blocks] int64, position of each block's first token.
        spans: [num_blocks, 2] int64, first and one past the last position that is scored.
        config: the settings.
        max_distance: largest distance, in tokens.
        table: rotations of the model.
    """
    size = config.distance_bucket_size
    counts = (spans[:, 1] - spans[:, 0] + size - 1) // size
    run_start_loc = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    block = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    run = torch.arange(len(block), device=counts.device) - run_start_loc[block]
    nearest = (starts[block] - spans[block, 0] - run * size - (size - 1)).clamp(min=0)
    cos, sin = run_rotations(nearest, config, max_distance, table)
    alike = num_clipped(starts - spans[:, 0] - (size - 1), size, max_distance)
    return Distances(cos, sin, size, run_start_loc, table.interleaved, torch.minimum(alike, counts))


def run_rotations(
    nearest: Tensor, config: TokenSelectConfig, max_distance: int, table: RotaryTable
) -> tuple[Tensor, Tensor]:
    """Rotations of the query for runs of keys.

    Args:
        nearest: [num_runs] int64, smallest distance of each run.
        config: the settings.
        max_distance: largest distance, in tokens.
        table: rotations of the model.

    Returns:
        Cosines and sines, each [num_runs, rotary_dim / 2] float32; no rotations proper: they change lengths.
    """
    frequencies = table.frequencies  # a steady step on a GPU works them out every time
    cos, sin = mean_rotation(frequencies, nearest, config.distance_bucket_size, max_distance)
    if config.scoring == "merged":
        near_cos, near_sin = _rotation_by(config.num_local_tokens, frequencies)
        weight = config.position_free_weight
        cos, sin = (cos + weight * near_cos) / (1 + weight), (sin + weight * near_sin) / (1 + weight)
    return cos.float(), sin.float()


def _rotation_by(distance: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angle = frequencies * distance
    return angle.cos(), angle.sin()


def num_clipped(nearest: Tensor, size: int, max_distance: int) -> Tensor:
    """How many runs of `size` keys `mean_rotation` rotates alike, of those from `nearest` on that come ever nearer."""
    return ((nearest - max_distance + (size - 1) // 2) // size + 1).clamp(min=0)


def take_runs(view: Distances, rows: Sequence[int]) -> Distances:
    """A view of some of the blocks."""
    bounds = view.run_start_loc.tolist()
    runs = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows]).to(view.cos.device)
    lengths = torch.tensor([bounds[row + 1] - bounds[row] for row in rows], device=view.cos.device)
    start_loc = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    alike = None if view.alike is None else view.alike[lengths.new_tensor(rows)]
    return Distances(view.cos[runs], view.sin[runs], view.run_size, start_loc, view.interleaved, alike)
