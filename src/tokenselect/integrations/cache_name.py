"""What Transformers calls the cache of a model: `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # the last one: layers of GPT-NeoX, before 5.24
# That of arguments and outputs.
CACHE = "cache" if any(item.name == "cache" for item in fields(BaseModelOutputWithPast)) else "past_key_values"


def cache_argument(parameters: Collection[str]) -> str:
    """By which name a function takes the cache, by those of its parameters."""
    return next((name for name in CACHE_NAMES if name in parameters), CACHE)


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among arguments, by whatever name; None: there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def handed_cache(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments that a layer is handed.

    Raises:
        NotImplementedError: there is none, which is so where a later Transformers calls it by another name.
    """
    cache = cache_in(given)
    if cache is None:
        raise NotImplementedError(
            f"Transformers {transformers.__version__} hands its layers no cache by a known name "
            f"({', '.join(CACHE_NAMES)}): install a later tokenselect, or an earlier Transformers"
        )
    return cache
