"""Rows of a cache in host memory and their copies on a device, in plain torch: who gets a place, and what is copied.

The device keeps the rows that were used last. Which are missing is known on the device alone; shapes depend only on how
many rows are asked for, so nobody waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABSENT = -(2**31)  # place of a slot that has no row


def claim_rows(slots: Tensor, places: Tensor, holders: Tensor, used: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Give every slot a row, in place of those used longest ago, of which none is one that is asked for now.

    Args:
        slots: [n] int64, at most as many different ones as there are rows.
        places: [num_slots + 1] int32, the row of each slot, `ABSENT` where it has none; the last entry is nobody's.
            Written to, as `holders` and `used`.
        holders: [num_rows + 1] int32, the slot of each row, `num_slots` where it is free; the last row is nobody's.
        used: [num_rows + 1] int32, when each row was last asked for; 0: never.
        now: [1] int32 > 0, not less than any of `used`; one more when this returns. It counts on the device, so that a
            CUDA graph may hold the call.

    Returns:
        rows: [n] int64, where each slot's row is.
        targets: [n] int64, the same where the row must be copied there first, once for each; -1 elsewhere.
    """
    nobody, spare = places.shape[0] - 1, holders.shape[0] - 1
    index = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
    found = places[slots]
    is_here = found >= 0
    claims = -2 - index  # the first of equal slots wins
    places.scatter_reduce_(0, slots, torch.where(is_here, found, claims), "amax")
    is_new = places[slots] == claims
    used[torch.where(is_here, found, spare).long()] = now
    oldest = used[:-1].argsort(stable=True)
    rank = (is_new.cumsum(0) - 1).clamp(0, spare - 1)
    targets = torch.where(is_new, oldest[rank], spare)
    places[torch.where(is_new, holders[targets], nobody).long()] = ABSENT
    places[torch.where(is_new, slots, nobody)] = targets.int()
    holders[targets] = slots.int()
    used[targets] = now
    now += 1
    return places[slots].long(), torch.where(is_new, targets, -1)


def move_rows(
    keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor, key_rows: Tensor, value_rows: Tensor
) -> None:
    """Copy rows of one cache to rows of another, of which one may lie in host memory.

    Args:
        keys: [num_rows, num_kv_heads, head_dim], any strides between rows and heads.
        values: like `keys`; heads may have another size.
        sources: [n] int64, rows to copy.
        targets: [n] int64, where to, each once; -1: nowhere.
        key_rows: [num_target_rows, num_kv_heads, head_dim] in the dtype of `keys`.
        value_rows: like `key_rows`.
    """
    real = targets >= 0
    sources, targets = sources[real], targets[real]
    for rows, into in ((keys, key_rows), (values, value_rows)):
        into[targets.to(into.device)] = rows[sources.to(rows.device)].to(into.device)
