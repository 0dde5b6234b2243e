"""The server's settings, from `--additional-config '{"tokenselect": {...}}'`, and what one request may change."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from tokenselect.config import TokenSelectConfig

SECTION = "tokenselect"
# What a request may set in `vllm_xargs`: the setting, and the least value; the server's own value is the most.
REQUEST_SETTINGS = {"tokenselect_k": ("num_selected_tokens", 1), "tokenselect_dense_tokens": ("num_dense_tokens", 0)}


def read_settings(vllm_config: Any) -> TokenSelectConfig:
    """The settings as the engine's model follows them.

    Raises:
        ValueError: a setting is unknown or out of range, or the budget is larger than the model's trained window.
    """
    given = (vllm_config.additional_config or {}).get(SECTION, {})
    config = TokenSelectConfig.from_json(json.dumps(given)).for_window(trained_window(vllm_config))
    config.check_window(trained_window(vllm_config))
    return config


def trained_window(vllm_config: Any) -> int:
    """Positions that the model was trained for.

    Raises:
        ValueError: they were overwritten.
    """
    overrides = vllm_config.model_config.hf_overrides
    if isinstance(overrides, dict) and "max_position_embeddings" in overrides:
        raise ValueError(
            "TokenSelect must know the trained window: leave max_position_embeddings out of --hf-overrides and set "
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 to serve a longer --max-model-len"
        )
    return int(vllm_config.model_config.hf_text_config.max_position_embeddings)


def request_settings(config: TokenSelectConfig, extra: Mapping[str, Any] | None) -> TokenSelectConfig:
    """The settings of one request.

    Args:
        config: the server's.
        extra: the request's `vllm_xargs`.

    Raises:
        ValueError: a name that begins with "tokenselect" is unknown, or its value is out of range.
    """
    given = {name: value for name, value in (extra or {}).items() if name.startswith(SECTION)}
    return _changed(config, tuple(sorted(given.items()))) if given else config


@functools.lru_cache(maxsize=1024)
def _changed(config: TokenSelectConfig, given: tuple[tuple[str, Any], ...]) -> TokenSelectConfig:
    changes = {}
    for name, value in given:
        if name not in REQUEST_SETTINGS:
            raise ValueError(f"unknown setting {name} in vllm_xargs; known are {', '.join(REQUEST_SETTINGS)}")
        field, low = REQUEST_SETTINGS[name]
        high = getattr(config, field)
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise ValueError(f"{name} must be a whole number between {low} and {high}, got {value!r}")
        changes[field] = number
    return config.replace(**changes)


def _whole(value: Any) -> int | None:
    """vLLM hands over numbers as they came in JSON: 256, or 256.0 where it takes floats only."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)
