"""Every setting of the method, its default and its limits: the one place where defaults are written."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

Scoring = Literal["merged", "mix", "position_free", "distance"]
ReuseTest = Literal["group_min", "flat"]
ScoreDtype = Literal["same", "int8"]

_LARGEST = 2**31 - 1


def _setting(default: Any, text: str, *, low: int = 0) -> Any:
    return field(default=default, metadata={"help": text, "low": low})


@dataclass(frozen=True, slots=True)
class TokenSelectConfig:
    """Settings of the selection; immutable and checked when made.

    Token counts are per sequence and layer. The defaults are ours (method.md, section 5); `paper()` gives the
    published ones. Command line flags, their help and the documentation are made from these fields.

    Raises:
        ValueError: a setting is out of its range; the message names it, its value and the range.
        TypeError: a setting has the wrong type.
    """

    num_sink_tokens: int = _setting(128, "first tokens, always attended")
    num_local_tokens: int = _setting(512, "tokens right before a block, always attended")
    num_selected_tokens: int = _setting(512, "tokens chosen by vote among the rest; 0: sinks + local alone")
    num_dense_tokens: int = _setting(
        8192, "a context of at most so many tokens, and no more than the model's trained window, is attended whole"
    )
    block_size: int = _setting(512, "consecutive prompt tokens that share one selection", low=1)
    num_tail_tokens: int = _setting(64, "last prompt tokens, which select one by one")
    scoring: Scoring = _setting(
        "merged",
        "how keys are scored: position_free, all at one distance; distance, at bucketed distances; merged, by one "
        "query that adds both logits; mix, by both, one after the other",
    )
    score_dtype: ScoreDtype = _setting(
        "int8", "what scoring reads: the keys as they are cached, or a copy in int8, half the bytes of 16-bit keys"
    )
    kv_offload: bool = _setting(
        False, "keep keys and values in host memory; the GPU has the int8 copy and the rows that were attended last"
    )
    distance_bucket_size: int = _setting(64, "tokens scored at one mean distance", low=1)
    max_distance: int | None = _setting(
        None, "largest distance that scoring uses; default: 7/8 of the model's trained window", low=1
    )
    head_weights: bool = _setting(
        False, "count sinks and local tokens in each head's softmax, so that heads that look there vote less"
    )
    position_free_weight: float = _setting(
        2.0, "merged: how often the logit at one distance counts, beside the one at the key's own"
    )
    vote_horizon: int = _setting(
        512, "a vote counts half for a token so far before the local window, the farther the less; 0: all alike"
    )
    vote_prior: float = _setting(
        1e-4, "with a vote_horizon: votes of each token beforehand; where no other stands out, the nearest are chosen"
    )
    scale_votes: bool = _setting(True, "scale the logits of the vote by the model's attention scale")
    smoothing_window: int = _setting(1, "odd width of a max-pool over the votes; 1: none", low=1)
    reuse_threshold: float = _setting(
        2.0, "Selection Cache: cosine above which decoding reuses the last selection; above 1: off"
    )
    reuse_test: ReuseTest = _setting("group_min", "Selection Cache: least cosine of the KV groups, or of all heads")
    local_includes_block: bool = _setting(False, "count the block itself in num_local_tokens (as the paper does)")
    prefill_chunk_size: int = _setting(2048, "prompt tokens that go through the model at once", low=1)
    backend: str = _setting("auto", "which implementation of the operations runs")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), hints[item.name], item.metadata["low"])
        if self.smoothing_window % 2 == 0:
            raise ValueError(f"smoothing_window must be odd, got {self.smoothing_window}")
        if self.kv_offload and self.score_dtype != "int8":
            raise ValueError(f"score_dtype must be 'int8' when kv_offload is set, got {self.score_dtype!r}")
        if self.local_includes_block and self.block_size > self.num_local_tokens:
            raise ValueError(
                f"num_local_tokens must be >= block_size ({self.block_size}) when local_includes_block is set, "
                f"got {self.num_local_tokens}"
            )

    @classmethod
    def paper(cls) -> TokenSelectConfig:
        """The published settings (Wu et al., EMNLP 2025, section 4 and their code)."""
        return cls(
            num_selected_tokens=2048,
            num_dense_tokens=0,
            num_tail_tokens=0,
            scoring="position_free",
            vote_horizon=0,
            scale_votes=False,
            reuse_threshold=0.9,
            reuse_test="flat",
            local_includes_block=True,
        )

    @property
    def reuse(self) -> bool:
        """Whether the Selection Cache is on."""
        return self.reuse_threshold <= 1.0

    @property
    def dense_limit(self) -> int:
        """Largest block start at which every earlier token fits the budget, so that nothing is selected."""
        return self.num_sink_tokens + self.num_selected_tokens + self.num_local_tokens

    @property
    def center_tokens(self) -> int:
        """First tokens of a sequence whose mean key an int8 copy is counted from: every one that selects has them."""
        return max(1, min(1024, self.dense_limit))

    def covers(self, num_tokens: int, block_start: int) -> bool:
        """Whether a block attends every earlier token, in a context of `num_tokens`."""
        return block_start <= self.dense_limit or num_tokens <= self.num_dense_tokens

    def num_attended(self, num_tokens: int) -> int:
        """The most tokens that a query attends, in a context of `num_tokens`."""
        return num_tokens if num_tokens <= self.num_dense_tokens else min(num_tokens, self.budget)

    @property
    def num_positions(self) -> int:
        """Positions that attended tokens can have."""
        return max(self.budget, self.num_dense_tokens)

    @property
    def num_resident_tokens(self) -> int:
        """Tokens of a sequence whose keys and values stay on the GPU when they are offloaded.

        Room for several selections, and for a context that is attended whole.
        """
        return max(4 * self.budget, self.num_positions)

    @property
    def budget(self) -> int:
        """The most tokens that a query attends which selects.

        With the Selection Cache on, a decode step may reach back over twice the local window.
        """
        own = self.block_size
        if self.reuse:
            own = max(own, self.num_local_tokens + 1)
        return self.dense_limit + own

    def for_window(self, trained_window: int) -> TokenSelectConfig:
        """The settings as a model with this trained window follows them: it attends no longer context whole."""
        return self.replace(num_dense_tokens=min(self.num_dense_tokens, trained_window))

    def check_window(self, trained_window: int) -> None:
        """Refuse a budget that the model was not trained for.

        Args:
            trained_window: positions that the model's rotary embedding covers.

        Raises:
            ValueError: the budget is larger; names both and the settings to lower.
        """
        if self.budget > trained_window:
            raise ValueError(
                f"the budget of {self.budget} tokens ({self.num_sink_tokens} sink + {self.num_selected_tokens} "
                f"selected + {self.num_local_tokens} local + {self.budget - self.dense_limit} block) is larger than "
                f"the model's trained window of {trained_window}: lower num_selected_tokens, num_local_tokens "
                "or block_size"
            )

    def replace(self, **changes: Any) -> TokenSelectConfig:
        """A copy with some settings changed, checked like a new one."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """All settings as a JSON object; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TokenSelectConfig:
        """Settings from a JSON object; a missing one takes its default.

        Raises:
            ValueError: not a JSON object, or it holds an unknown or invalid setting.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the settings are not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"the settings must be a JSON object, got {type(values).__name__}")
        known = [item.name for item in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None


def _check(name: str, value: Any, hint: Any, low: int) -> None:
    if value is None and type(None) in get_args(hint):
        return
    if choices := [item for item in get_args(hint) if isinstance(item, str)]:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return
    wanted = next((kind for kind in (bool, str, float) if hint is kind), int)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= _LARGEST else math.inf
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be {wanted.__name__}, got {value!r}")
    if wanted is float and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    if wanted is int and not low <= value <= _LARGEST:
        raise ValueError(f"{name} must be between {low} and {_LARGEST}, got {value}")
