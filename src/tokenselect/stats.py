"""What one answer took, in numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Cache


@dataclass(frozen=True, slots=True)
class Stats:
    """Numbers of one answer.

    Attributes:
        model: what the caller calls the model.
        method: "tokenselect", "streaming" or "dense".
        trained_window: positions that the model was trained for.
        prompt_tokens: tokens of the prompt, those of earlier turns included.
        cached_tokens: how many of them were kept from earlier turns and not read again.
        new_tokens: tokens of the answer, an end token included.
        ttft_s: seconds from the call to the first new token; None if there is none.
        prefill_tokens_per_s: tokens read, over `ttft_s`.
        decode_tokens_per_s: new tokens after the first, over the time they took; None if there are none.
        budget: the most tokens that a query attends which selects; None for dense attention.
        attended_share: tokens attended over tokens there were, for the queries that selected; 1.0 if none did.
        reuse_hit_rate: share of decode steps that the Selection Cache served; None if it was never asked.
        kv_bytes: keys and values held at the end, room for growth and an int8 copy for scoring not counted.
        peak_memory_bytes: the most memory used, weights included.
        peak_memory_scope: of what and since when that was measured.
        config: the settings as the model follows them; None for dense attention.
    """

    model: str
    method: str
    trained_window: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    budget: int | None
    attended_share: float
    reuse_hit_rate: float | None
    kv_bytes: int
    peak_memory_bytes: int
    peak_memory_scope: str
    config: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)

    def to_json(self) -> str:
        """All numbers as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True, slots=True)
class Counts:
    """What the layers of a cache have counted so far; see `SelectionState`."""

    attended: int = 0
    available: int = 0
    lookups: int = 0
    hits: int = 0

    @classmethod
    def of(cls, cache: Cache) -> Counts:
        """Sums over the layers that select."""
        states = [state for layer in cache.layers for state in getattr(layer, "states", ())]
        names = ("attended", "available", "lookups", "hits")
        return cls(*(sum(getattr(state, name) for state in states) for name in names))

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`."""
        return Counts(
            self.attended - before.attended,
            self.available - before.available,
            self.lookups - before.lookups,
            self.hits - before.hits,
        )

    @property
    def attended_share(self) -> float:
        """1.0 where nothing was selected."""
        return self.attended / self.available if self.available else 1.0

    @property
    def reuse_hit_rate(self) -> float | None:
        """None where no step asked."""
        return self.hits / self.lookups if self.lookups else None


def cached_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def rates(start: float, times: Sequence[float], tokens_read: int) -> tuple[float | None, float | None, float | None]:
    """Time to first token, tokens read per second, tokens written per second; None where there is no such."""
    if not times:
        return None, None, None
    ttft, decode = times[0] - start, times[-1] - times[0]
    return ttft, tokens_read / ttft if ttft > 0 else None, (len(times) - 1) / decode if decode > 0 else None
