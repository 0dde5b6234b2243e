"""The server's settings, from `--additional-config '{"tokenselect": {...}}'`, and what one request may change."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenselect.config import TokenSelectConfig

SECTION = "tokenselect"
_TRACE_FOLDER = "trace_folder"  # in it, beside the settings of the selection
# What a request may set in `vllm_xargs`: the setting, and the least value; the server's own value is the most.
TRACE = "tokenselect_trace"  # of a request: 1, keep what it selects
REQUEST_SETTINGS = {"tokenselect_k": ("num_selected_tokens", 1), "tokenselect_dense_tokens": ("num_dense_tokens", 0)}


def read_settings(vllm_config: Any) -> TokenSelectConfig:
    """The settings as the engine's model follows them.

    Raises:
        ValueError: a setting is unknown or out of range, or the budget is larger than the model's trained window.
    """
    given = {name: value for name, value in _section(vllm_config).items() if name != _TRACE_FOLDER}
    config = TokenSelectConfig.from_json(json.dumps(given)).for_window(trained_window(vllm_config))
    check_settings(config)
    config.check_window(trained_window(vllm_config))
    return config


def check_settings(config: TokenSelectConfig) -> None:
    """Refuse what no engine of vLLM can do.

    Raises:
        ValueError: it is asked for.
    """
    if config.kv_offload:
        raise ValueError("TokenSelect: kv_offload must be false, got true: under vLLM the KV cache is vLLM's own")


def _section(vllm_config: Any) -> Mapping[str, Any]:
    given: Mapping[str, Any] = (vllm_config.additional_config or {}).get(SECTION, {})
    return given


def trace_folder(vllm_config: Any) -> Path | None:
    """Where traces of requests may be kept; None: the server keeps none.

    Raises:
        ValueError: it is no name of a folder, or the engine cannot trace.
    """
    folder = _section(vllm_config).get(_TRACE_FOLDER)
    if folder is None:
        return None
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"trace_folder must be the name of a folder, got {folder!r}")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"trace_folder must be the name of a folder, {folder!r} is a file")
    if vllm_config.parallel_config.world_size > 1:
        raise ValueError("trace_folder cannot be used with tensor or pipeline parallelism: no process sees all votes")
    if vllm_config.model_config.skip_tokenizer_init:
        raise ValueError("trace_folder needs the tokenizer: leave out --skip-tokenizer-init")
    return Path(folder)


def wants_trace(folder: Path | None, extra: Mapping[str, Any] | None) -> bool:
    """Whether a request is to be traced.

    Args:
        folder: what `trace_folder` gave.
        extra: the request's `vllm_xargs`.

    Raises:
        ValueError: its wish is neither 0 nor 1, or the server keeps no traces.
    """
    wish = (extra or {}).get(TRACE, 0)
    if _whole(wish) not in (0, 1):
        raise ValueError(f"{TRACE} must be 0 or 1, got {wish!r}")
    if wish and folder is None:
        raise ValueError(f"{TRACE} is not allowed: this server was started without trace_folder")
    return bool(wish)


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
    given = {name: value for name, value in (extra or {}).items() if name.startswith(SECTION) and name != TRACE}
    return _changed(config, tuple(sorted(given.items()))) if given else config


@functools.lru_cache(maxsize=1024)
def _changed(config: TokenSelectConfig, given: tuple[tuple[str, Any], ...]) -> TokenSelectConfig:
    changes = {}
    for name, value in given:
        if name not in REQUEST_SETTINGS:
            raise ValueError(f"unknown setting {name} in vllm_xargs; known are {', '.join([*REQUEST_SETTINGS, TRACE])}")
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
