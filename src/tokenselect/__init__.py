"""Read contexts far beyond a language model's trained window, fast and without training.

Names are loaded on first use, so that `import tokenselect` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed_version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenselect.config import TokenSelectConfig
    from tokenselect.integrations.transformers import TokenSelect, disable, enable
    from tokenselect.llm import LLM
    from tokenselect.ops import BackendUnavailable
    from tokenselect.selection import SelectionState, select_tokens

__all__ = [
    "LLM",
    "BackendUnavailable",
    "SelectionState",
    "TokenSelect",
    "TokenSelectConfig",
    "__version__",
    "disable",
    "enable",
    "select_tokens",
]

try:
    __version__ = _installed_version("tokenselect")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "LLM": "llm",
    "BackendUnavailable": "ops",
    "SelectionState": "selection",
    "TokenSelect": "integrations.transformers",
    "TokenSelectConfig": "config",
    "disable": "integrations.transformers",
    "enable": "integrations.transformers",
    "select_tokens": "selection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
