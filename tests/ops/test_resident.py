"""Copies of rows of host memory: who gets a place, and what is copied, by the definition and by the Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tokenselect.hardware import empty_pinned
from tokenselect.offload import Residents
from tokenselect.ops import gpu, reference
from tokenselect.ops.resident import ABSENT

if TYPE_CHECKING:
    from torch import Tensor

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 3, 20
backends = pytest.mark.parametrize("ops", [reference, gpu], ids=["reference", "gpu"])


def host_cache(num_slots: int, dim: int = DIM) -> Tensor:
    """Rows [num_slots, HEADS, dim] of a cache whose heads lie one after the other."""
    cache = empty_pinned((HEADS, num_slots, dim), torch.bfloat16)
    cache.copy_(torch.randn(cache.shape))
    return cache.transpose(0, 1)


def residents(ops: Any, num_slots: int, num_rows: int) -> Residents:
    return Residents(host_cache(num_slots), host_cache(num_slots, 12), num_rows, DEVICE, ops)


def ask(kept: Residents, slots: list[int]) -> Tensor:
    """Bring rows and check that they are right, that equal slots have one row, and that both tables agree."""
    rows = kept.bring(torch.tensor(slots, dtype=torch.int64, device=DEVICE)).cpu()
    for cache, copies in zip(kept.cache, (kept.keys, kept.values), strict=True):
        assert torch.equal(copies.cpu()[rows], cache[slots])
    assert rows.unique().numel() == len(set(slots))
    places, holders = kept.places[:-1].cpu(), kept.holders[:-1].cpu()
    held = holders < len(places)
    assert torch.equal(places[holders[held].long()], held.nonzero()[:, 0].int())
    assert int((places != ABSENT).sum()) == int(held.sum())
    return rows


@backends
def test_what_is_there_stays_where_it_is(ops: Any) -> None:
    kept = residents(ops, 50, 10)
    first = ask(kept, [7, 3, 40, 3, 7])
    assert first[0] == first[4]
    again = ask(kept, [40, 8, 7, 3])
    assert again[[2, 3, 0]].tolist() == first[[0, 1, 2]].tolist()


@backends
def test_only_what_is_missing_is_copied(ops: Any) -> None:
    kept = residents(ops, 50, 10)
    rows = ask(kept, [1, 2, 3])
    kept.cache[0][1:4] = 0  # not seen: 1, 2 and 3 are there already
    again = kept.bring(torch.tensor([3, 2, 1, 4], device=DEVICE)).cpu()
    assert torch.equal(again[:3], rows.flip(0))
    assert kept.keys.cpu()[rows].abs().amin(dim=(1, 2)).ge(0).all()
    assert (kept.keys.cpu()[rows].float().abs().sum(dim=(1, 2)) > 0).all()


@backends
@pytest.mark.parametrize("num_rows", [40, 64])
def test_those_used_longest_ago_go(ops: Any, num_rows: int) -> None:
    kept, last = residents(ops, 300, num_rows), dict[int, int]()
    for step in range(30):
        slots = torch.randint(0, 300 if step % 3 else 60, (40,)).tolist()
        before = {int(slot) for slot in kept.holders[:-1].cpu() if slot < 300}
        ask(kept, slots)
        last |= dict.fromkeys(slots, step)
        after = {int(slot) for slot in kept.holders[:-1].cpu() if slot < 300}
        gone, stayed = before - after, (before & after) - set(slots)
        if gone and stayed:
            assert max(last[slot] for slot in gone) <= min(last[slot] for slot in stayed)
        assert len(after) == min(num_rows, len(last))


@backends
def test_all_rows_at_once_and_none(ops: Any) -> None:
    kept = residents(ops, 30, 8)
    ask(kept, list(range(8)))
    ask(kept, list(range(8, 16)))
    ask(kept, list(range(12, 20)))
    assert kept.bring(torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (0,)


def test_more_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.ops.gpu import resident

    monkeypatch.setattr(resident, "_AT_HAND", 64)
    kept = residents(gpu, 1000, 300)
    for low in (0, 150, 450, 100):
        ask(kept, torch.randint(low, low + 400, (275,)).tolist())


@backends
def test_rows_move_to_host_memory_and_back(ops: Any) -> None:
    fresh = torch.randn(2, HEADS, 5, DIM, device=DEVICE).bfloat16().transpose(1, 2).flatten(0, 1)
    keys, values = host_cache(30), host_cache(30)
    before = keys.clone()
    targets = torch.tensor([4, -1, 29, 0, 7, 8, -1, 1, 2, 3], device=DEVICE)
    ops.move_rows(fresh, fresh, torch.arange(10, device=DEVICE), targets, keys, values)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    real = (targets >= 0).cpu()
    places = targets.cpu()[real]
    assert torch.equal(keys[places], fresh.cpu()[real])
    assert torch.equal(values[places], fresh.cpu()[real])
    untouched = [row for row in range(30) if row not in places.tolist()]
    assert torch.equal(keys[untouched], before[untouched])
