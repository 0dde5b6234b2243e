"""KV cache layer for Transformers: raw keys in buffers that grow geometrically; a step copies only its own tokens."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tokenselect.hardware import advise_huge_pages
from tokenselect.ops.paging import PageTable, first_pages
from tokenselect.selection import SelectionState

_GROWTH = 1.5
_LEAST_CAPACITY = 256


@dataclass(slots=True, eq=False, weakref_slot=True)
class Owner:
    """Who filled a cache: raw keys mean nothing to a model that rotates them itself."""

    active: bool = True
    quantize: Callable[..., Any] | None = None  # `ops.quantize_rows`: scoring reads an int8 copy
    center_tokens: int = 0  # first tokens whose mean the copy is counted from; a sequence that selects has more
    plan: Any = None  # of the forward pass that runs; see integrations.transformers
    reserve: int = 0  # tokens that are known to come
    traced: bool = False  # whether layers run as traced programs in the forward pass that runs


@dataclass(slots=True)
class Buffers:
    """Keys and values [B, Hkv, capacity, D] of one layer, and what is known of them."""

    keys: Tensor
    values: Tensor
    length: int = 0
    copy: Int8Copy | None = None
    pages: PageTable | None = None  # of these buffers
    states: list[SelectionState] = field(default_factory=list)
    remembered: Any = None  # by the device, which may know more than the states; see integrations.remembered

    def forget_rows(self) -> None:
        """Bring the states up to date: sequences take other rows."""
        self.pages = None
        if self.remembered is not None:
            self.remembered.give(self.states)
            self.remembered = None


@dataclass(slots=True)
class Int8Copy:
    """An int8 copy of raw keys, and what it is counted from; see `ops.reference.quantize_rows`."""

    integers: Tensor  # [B, Hkv, capacity, D]
    scales: Tensor  # [B, Hkv, capacity]
    center: Tensor  # [B, Hkv, D]
    lengths: list[int]  # tokens copied of each sequence, padding included
    padding: list[int] = field(default_factory=list)

    @classmethod
    def like(cls, keys: Tensor, device: torch.device) -> Int8Copy:
        """Room on a device for a copy of `keys` [B, Hkv, capacity, D]."""
        batch, heads, _, dim = keys.shape
        integers = torch.empty(keys.shape, dtype=torch.int8, device=device)
        scales = torch.empty(keys.shape[:3], dtype=torch.float32, device=device)
        center = torch.empty((batch, heads, dim), dtype=torch.float32, device=device)
        return cls(advise_huge_pages(integers), scales, center, [0] * batch)

    def update(self, read: Callable[[int, int, int], Tensor], length: int, padding: list[int], owner: Owner) -> None:
        """Copy the tokens that are new, of sequences that are long enough to select.

        The center of a sequence is the mean of its first tokens, always of the same ones: so neither chunks nor
        other sequences change what is selected.

        Args:
            read: gives the keys [Hkv, n, D] of a sequence from one token to another.
            length: tokens cached of each sequence.
            padding: rows before each sequence's first token.
            owner: of the cache.
        """
        if padding != self.padding:
            self.lengths, self.padding = [0] * len(padding), padding
        for i, pad in enumerate(padding):
            first = pad + owner.center_tokens
            if length < first or self.lengths[i] == length:
                continue
            if self.lengths[i] < first:
                self.center[i] = read(i, pad, first).float().mean(1)
                self.lengths[i] = pad
            new = slice(self.lengths[i], length)
            assert owner.quantize is not None
            into = self.integers[i, :, new].transpose(0, 1), self.scales[i, :, new].T
            owner.quantize(read(i, new.start, length).transpose(0, 1), self.center[i], into)
            self.lengths[i] = length

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integers [num_rows, Hkv, D] and scales [num_rows, Hkv] as rows of a paged cache, and the center."""
        batch, heads, capacity = self.scales.shape
        scales = self.scales.as_strided(((batch * heads - heads + 1) * capacity, heads), (1, capacity))
        return _as_rows(self.integers), scales, self.center

    def take(self, rows: Tensor) -> Int8Copy:
        """The copies of some of the sequences."""
        chosen = rows.tolist()
        lengths, padding = ([part[row] for row in chosen] for part in (self.lengths, self.padding))
        return Int8Copy(self.integers[rows], self.scales[rows], self.center[rows], lengths, padding)


class RawKeyLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys before rotary embedding, and values, of one layer: [B, Hkv, capacity, D], one row per token.

    Args:
        owner: shared by the layers of a cache.
        index: of the layer in its model.
    """

    is_sliding = False
    is_croppable = True
    fetches_rows = False  # rows lie elsewhere and must be brought to be attended

    def __init__(self, owner: Owner, index: int = 0) -> None:
        self.owner, self.index = owner, index
        self.handed: tuple[Tensor, Tensor] | None = None  # what the host got: it must come back unchanged
        self._own: Buffers | None = None
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, length, D] raw keys, a view."""
        return None if self._own is None else self._own.keys[:, :, : self._own.length]

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, length, D] values, a view."""
        return None if self._own is None else self._own.values[:, :, : self._own.length]

    @property
    def states(self) -> list[SelectionState]:
        """What the layer remembers of each sequence of the batch; waits for a device that knows more."""
        own = self._own
        if own is not None and own.remembered is not None:
            own.remembered.give(own.states)
        return [] if own is None else own.states

    @property
    def most_rows(self) -> int:
        """Rows that can be attended at once."""
        return sys.maxsize

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers on first use."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        capacity = max(_LEAST_CAPACITY, self.owner.reserve, key_states.shape[2])
        self._own = Buffers(
            self._room((batch, heads, capacity, dim)),
            # autocast may make values of another type than keys
            self._room((batch, heads, capacity, value_states.shape[3])),
            states=[SelectionState() for _ in range(batch)],
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens.

        Args:
            key_states: [B, Hkv, T, D] raw keys.
            value_states: [B, Hkv, T, D].

        Returns:
            Views of all keys and values so far.

        Raises:
            RuntimeError: TokenSelect was left: the model now rotates keys itself and cannot use this cache.
        """
        if not self.owner.active:
            raise RuntimeError(
                "this cache was filled under TokenSelect and holds raw keys: "
                "use it inside TokenSelect, or start a new one"
            )
        if self._own is None:
            self.lazy_initialization(key_states, value_states)
        own = self._own
        assert own is not None
        end = own.length + key_states.shape[2]
        self._grow(own, end)
        self._write(own, key_states, value_states)
        own.length = end
        self.handed = own.keys[:, :, :end], own.values[:, :, :end]
        return self.handed

    def attend(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attention [B, Tq, Hq, D] of `query` [B, Hq, Tq, D], as the running forward pass plans it."""
        result: Tensor = self.owner.plan.attend(self, query, scale, softcap, sinks)
        return result

    def _room(self, shape: Sequence[int]) -> Tensor:
        """Uninitialised memory for keys or values."""
        return advise_huge_pages(torch.empty(tuple(shape), dtype=self.dtype, device=self.device))

    def _write(self, own: Buffers, key_states: Tensor, value_states: Tensor) -> None:
        """Put new tokens behind the others."""
        new = slice(own.length, own.length + key_states.shape[2])
        own.keys[:, :, new] = key_states
        own.values[:, :, new] = value_states

    def _grow(self, own: Buffers, needed: int) -> None:
        if needed <= own.keys.shape[2]:
            return
        capacity = max(int(own.keys.shape[2] * _GROWTH), needed, self.owner.reserve)
        self._moves()
        own.keys = self._enlarged(own.keys, own.length, capacity)
        own.values = self._enlarged(own.values, own.length, capacity)
        own.forget_rows()

    def _enlarged(self, buffer: Tensor, length: int, capacity: int) -> Tensor:
        batch, heads, _, dim = buffer.shape
        larger = self._room((batch, heads, capacity, dim))
        larger[:, :, :length] = buffer[:, :, :length]
        return larger

    def _moves(self) -> None:
        """Called before tokens are taken back, or change their rows."""

    def attended_rows(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [num_rows, Hkv, D] on the device, and where in them the rows `slots` of the cache are."""
        return *self.rows(), slots

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values as rows [num_rows, Hkv, D] of one paged cache: sequence `b` is page `b * Hkv`."""
        assert self._own is not None
        return _as_rows(self._own.keys), _as_rows(self._own.values)

    def raw_rows(self) -> Tensor:
        """Raw keys as rows, for who reads them on the host's account."""
        return self.rows()[0]

    def scoring_rows(self, padding: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keys as scoring reads them: as they are, or their int8 copy, brought up to date, its scales and center."""
        own = self._own
        assert own is not None
        if self.owner.quantize is None:
            return _as_rows(own.keys), None, None
        if own.copy is None or own.copy.integers.shape != own.keys.shape:
            own.copy = Int8Copy.like(own.keys, self.device)
        own.copy.update(self._read, own.length, padding, self.owner)
        return own.copy.rows()

    # -- a step of one token that the device writes by itself (integrations.steady) -----------------------------------

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """[B, Hkv, capacity, D] of the keys."""
        return () if self._own is None else tuple(self._own.keys.shape)

    @property
    def int8_copy(self) -> Int8Copy | None:
        """What scoring reads in place of the keys."""
        return None if self._own is None else self._own.copy

    def takes_one_more(self, padding: list[int]) -> bool:
        """Make room for a token of each sequence, and say whether all before it are as scoring reads them."""
        own = self._own
        if own is None or own.keys.shape[0] != len(padding):
            return False
        self._grow(own, own.length + 1)
        return self.owner.quantize is None or (
            own.copy is not None
            and own.copy.integers.shape == own.keys.shape
            and own.copy.lengths == [own.length] * len(padding)
            and own.copy.padding == padding
        )

    def scored_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `scoring_rows`, of what there is."""
        assert self._own is not None
        return (_as_rows(self._own.keys), None, None) if self._own.copy is None else self._own.copy.rows()

    def places(self) -> list[Tensor]:
        """What a step reads and writes: while these stay where they are, it may be repeated as it was."""
        own = self._own
        assert own is not None
        copy = [] if own.copy is None else [own.copy.integers, own.copy.scales, own.copy.center]
        kept = [] if own.remembered is None else own.remembered.places()
        return [own.keys, own.values, *copy, *kept]

    def remembered(self, padding: list[int], make: Callable[[Sequence[int], list[int]], Any]) -> Any:
        """What the device remembers, from now on more than our states; made of rows and padding."""
        own = self._own
        assert own is not None
        if own.remembered is None or own.remembered.padding != padding:
            own.forget_rows()
            batch, heads, capacity, _ = own.keys.shape
            own.remembered = make(range(0, batch * heads * capacity, heads * capacity), padding)
        own.remembered.take(own.states, own.length)
        return own.remembered

    def count_one(self, num_attended: int | None, padding: list[int]) -> None:
        """Note that the device wrote a token of each sequence, whose query attended so many; None: it counts itself."""
        own = self._own
        assert own is not None
        own.length += 1
        if own.copy is not None:
            own.copy.lengths = [own.length] * len(padding)
        if num_attended is not None:
            for state, pad in zip(own.states, padding, strict=True):
                state.count(1, num_attended, own.length - pad)

    def _read(self, sequence: int, start: int, end: int) -> Tensor:
        """Raw keys [Hkv, end - start, D] of a sequence, padding counted, on the device."""
        assert self._own is not None
        return self._own.keys[sequence, :, start:end]

    def page_table(self, padding: list[int]) -> PageTable:
        """Where the tokens of each sequence lie in `rows()`."""
        own = self._own
        assert own is not None
        if own.pages is None or own.pages.padding != padding:
            batch, heads, capacity, _ = own.keys.shape
            own.pages = PageTable(first_pages(batch, heads, self.device), capacity, padding)
        return own.pages

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the cache for a mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens cached, padding included."""
        return 0 if self._own is None else self._own.length

    def get_max_length(self) -> int:
        """No limit: -1."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._own = self.handed = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a count <= 0, as in Transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a count <= 0 of tokens to remove, got {tokens_to_remove}")
        if self._own is None or tokens_to_remove == 0:
            return
        self._moves()
        self._own.length = max(0, self._own.length + tokens_to_remove)
        if self._own.copy is not None:
            self._own.copy.lengths = [min(length, self._own.length) for length in self._own.copy.lengths]
        for state in self.states:
            state.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` continue row `beam_idx[i]` (beam search)."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self._own is not None:
            rows = torch.arange(len(self._own.states), device=self.device)
            self._take(rows.repeat_interleave(repeats))

    def _take(self, rows: Tensor) -> None:
        own = self._own
        if own is None:
            return
        self._moves()
        rows = rows.to(self.device)
        own.keys = self._taken(own.keys, rows, own.length)
        own.values = self._taken(own.values, rows, own.length)
        own.forget_rows()
        own.copy = own.copy and own.copy.take(rows)
        own.states = [copy.copy(own.states[row]) for row in rows.tolist()]

    def _taken(self, buffer: Tensor, rows: Tensor, length: int) -> Tensor:
        """Rows of a batch; only the filled part is copied."""
        rows = rows.to(buffer.device)
        if rows.shape[0] != buffer.shape[0]:
            return self._enlarged(buffer[:, :, :length][rows], length, buffer.shape[2])
        buffer[:, :, :length] = buffer[:, :, :length][rows]
        return buffer


def _as_rows(buffer: Tensor) -> Tensor:
    batch, heads, capacity, dim = buffer.shape
    return buffer.as_strided(((batch * heads - heads + 1) * capacity, heads, dim), (dim, capacity * dim, 1))
