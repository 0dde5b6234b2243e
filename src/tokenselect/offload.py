"""Cache layer whose keys and values lie in host memory: the device keeps an int8 copy of the keys, and few whole rows.

Scoring reads the copy. What is attended is brought in first, of which little is missing: sinks, the local window and
most of what a step selects were attended by the step before, and rows that are in demand stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenselect.cache import Buffers, Owner, RawKeyLayer
from tokenselect.hardware import empty_pinned
from tokenselect.ops import Backend
from tokenselect.ops.resident import ABSENT


class Residents:
    """Rows of a cache in host memory that have a copy on the device.

    Args:
        keys: [num_slots, Hkv, D], rows of the cache.
        values: like `keys`.
        num_rows: copies kept at the most.
        device: where.
        ops: the backend.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_rows: int, device: torch.device, ops: Backend) -> None:
        self.ops, self.cache = ops, (keys, values)
        self.keys, self.values = (
            torch.empty((num_rows, *part.shape[1:]), dtype=part.dtype, device=device) for part in self.cache
        )
        num_slots = keys.shape[0]
        self.places = torch.full((num_slots + 1,), ABSENT, dtype=torch.int32, device=device)
        self.holders = torch.full((num_rows + 1,), num_slots, dtype=torch.int32, device=device)
        self.used = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.clock = torch.ones(1, dtype=torch.int32, device=device)

    def bring(self, slots: Tensor) -> Tensor:
        """Copy those of the rows `slots` [n] that are missing; at most as many as there is room for.

        Returns:
            [n] int64, where they are in `keys` and `values`.
        """
        rows, targets = self.ops.claim_rows(slots, self.places, self.holders, self.used, self.clock)
        self.ops.move_rows(*self.cache, slots, targets, self.keys, self.values)
        return rows


class OffloadedLayer(RawKeyLayer):
    """A `RawKeyLayer` that needs little memory on the device.

    Args:
        owner: shared by the layers of a cache.
        index: of the layer in its model.
        ops: the backend.
        num_resident: rows per sequence that stay on the device.
    """

    fetches_rows = True

    def __init__(self, owner: Owner, index: int, ops: Backend, num_resident: int) -> None:
        super().__init__(owner, index)
        self.ops, self.num_resident = ops, num_resident
        self._residents: Residents | None = None
        self._new: Tensor | None = None  # keys of this pass, which are still on the device

    @property
    def most_rows(self) -> int:
        """Rows that can be attended at once."""
        if self._own is None:
            return 0
        batch, _, capacity, _ = self._own.keys.shape
        return batch * min(self.num_resident, capacity)

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, length, D] raw keys, a view of host memory."""
        self._settle()
        return super().keys

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, length, D] values, a view of host memory."""
        self._settle()
        return super().values

    def attend(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """See `RawKeyLayer.attend`."""
        result = super().attend(query, scale, softcap, sinks)
        self._new = None
        return result

    def attended_rows(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `RawKeyLayer.attended_rows`."""
        if self._residents is None:
            self._residents = Residents(*self.rows(), self.most_rows, self.device, self.ops)
        rows = self._residents.bring(slots)
        return self._residents.keys, self._residents.values, rows

    def places(self) -> list[Tensor]:
        """See `RawKeyLayer.places`."""
        kept = self._residents
        mine = [] if kept is None else [kept.keys, kept.values, kept.places, kept.holders, kept.used, kept.clock]
        return [*super().places(), *mine]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._residents = self._new = None

    def _room(self, shape: Sequence[int]) -> Tensor:
        return empty_pinned(shape, self.dtype)

    def _write(self, own: Buffers, key_states: Tensor, value_states: Tensor) -> None:
        """From the device, without waiting for it."""
        slots = self._slots(own, own.length, own.length + key_states.shape[2])
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (key_states, value_states))
        sources = torch.arange(keys.shape[0], device=keys.device)
        self.ops.move_rows(keys, values.to(keys.dtype), sources, slots.flatten(), *self.rows())
        self._new = key_states

    def _read(self, sequence: int, start: int, end: int) -> Tensor:
        own = self._own
        assert own is not None
        first = own.length - (self._new.shape[2] if self._new is not None else 0)
        if self._new is not None and start >= first:
            return self._new[sequence, :, start - first : end - first]
        keys, values = self.rows()
        slots = self._slots(own, start, end)[sequence]
        found = [
            torch.empty((end - start, *part.shape[1:]), dtype=part.dtype, device=self.device) for part in (keys, values)
        ]
        self.ops.move_rows(keys, values, slots, torch.arange(end - start, device=self.device), *found)
        return found[0].transpose(0, 1)

    def _slots(self, own: Buffers, start: int, end: int) -> Tensor:
        """Rows [B, end - start] of tokens, padding counted."""
        batch, heads, capacity, _ = own.keys.shape
        first = torch.arange(batch, device=self.device) * (heads * capacity)
        return first[:, None] + torch.arange(start, end, device=self.device)

    def _moves(self) -> None:
        """The simplest that is right: bring everything anew."""
        self._residents = self._new = None
        self._settle()

    def _settle(self) -> None:
        """Wait until the device has written, before the host reads."""
        if self._own is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def raw_rows(self) -> Tensor:
        """See `RawKeyLayer.raw_rows`."""
        self._settle()
        return super().raw_rows()


def make_layer(owner: Owner, index: int, ops: Backend, num_resident: int | None) -> RawKeyLayer:
    """The layer of a cache: in host memory where a number of resident rows is given."""
    return RawKeyLayer(owner, index) if num_resident is None else OffloadedLayer(owner, index, ops, num_resident)
