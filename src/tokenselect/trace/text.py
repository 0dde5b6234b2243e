"""Which part of the text every token is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text that tokens stand for, special tokens included.

    Args:
        tokenizer: any tokenizer of Transformers.
        ids: the tokens.

    Returns:
        The text, and where each token begins in it. Of several tokens that make one character the last one has it,
        the others are empty.
    """
    starts, pieces, length = [], [], 0
    for piece in _pieces(tokenizer, ids):
        starts.append(length)
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), starts


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        yield from (tokenizer.decode([token]) for token in ids)
        return
    stream = DecodeStream(skip_special_tokens=False)
    for token in ids:
        yield stream.step(fast, token) or ""
