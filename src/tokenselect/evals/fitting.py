"""Prompts of a given number of tokens: a task says what `size` items make, this finds the size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenselect.evals.texts import count_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from tokenselect.evals.question import Question

_PROBES = (16, 64)
_ROUNDS = 8
_ENOUGH = 0.99


def fit(tokenizer: PreTrainedTokenizerBase, num_tokens: int, build: Callable[[int], Question]) -> Question:
    """The question whose prompt is as long as it may be.

    Args:
        tokenizer: counts the tokens, those included that it adds of itself.
        num_tokens: the most tokens of the prompt.
        build: makes the question with so many items; more items, more tokens. Equal sizes give equal questions.

    Returns:
        A question of at most `num_tokens`; of at least 99% of them where one item more is no more than 1%.

    Raises:
        ValueError: not even the smallest one fits.
    """
    low, high = (count_tokens(tokenizer, build(size).prompt) for size in _PROBES)
    per_item = max((high - low) / (_PROBES[1] - _PROBES[0]), 0.1)
    size = max(1, int(_PROBES[0] + (num_tokens - low) / per_item))
    best: Question | None = None
    largest, too_large = 0, float("inf")
    for _ in range(_ROUNDS):
        question = build(size)
        tokens = count_tokens(tokenizer, question.prompt)
        if tokens > num_tokens:
            too_large = min(too_large, size)
        elif size > largest:
            best, largest = question, size
            if tokens >= _ENOUGH * num_tokens:
                break
        step = int((num_tokens * (1 + _ENOUGH) / 2 - tokens) / per_item)
        size = _between(size + step, largest, too_large)
        if size <= largest:
            break
    if best is None:
        raise ValueError(f"a prompt of {num_tokens} tokens leaves no room for a text around the question: allow more")
    return best


def _between(size: int, largest: int, too_large: float) -> int:
    """The proposed size, if it can teach anything; else the middle of what is not known yet."""
    if largest < size < too_large:
        return size
    if too_large == float("inf"):
        return largest + 1
    return (largest + int(too_large)) // 2
