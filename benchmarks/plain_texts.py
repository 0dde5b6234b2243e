"""Three real texts that need no download: speeches, manuals and code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch

from tokenselect.evals.texts import state_of_the_union, token_window
from tokenselect.models import LoadedModel

_MODULES = ("argparse", "ast", "inspect", "tarfile", "typing", "zipfile", "pickle", "subprocess")


def _manual() -> str:
    """Python's help texts; each paragraph once, for whole sections stand under several topics."""
    from pydoc_data.topics import topics

    paragraphs = (part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def _code() -> str:
    """Sources of Python's own modules."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)


TEXTS: dict[str, Callable[[], str]] = {"sotu": state_of_the_union, "manual": _manual, "code": _code}


def text_ids(loaded: LoadedModel, name: str, length: int) -> torch.Tensor:
    """[1, length] tokens from a third of a text on."""
    text = TEXTS[name]()
    window = token_window(loaded.tokenizer, text, length + 64, len(text) // 3)
    ids = loaded.tokenizer(window, return_tensors="pt", verbose=False, add_special_tokens=False).input_ids[:, :length]
    return ids.to(loaded.model.device)
