"""What needles are hidden in: repeated sentences or a real text, cut where a needle may stand."""

from __future__ import annotations

from functools import cache
from itertools import cycle, islice
from typing import TYPE_CHECKING

from tokenselect.evals.needle import HAYSTACK
from tokenselect.evals.texts import sentence_starts, state_of_the_union

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random


def noise(size: int) -> list[str]:
    """The first `size` of five sentences that repeat without end."""
    return list(islice(cycle(HAYSTACK), size))


def essay(random: Random, size: int) -> list[str]:
    """`size` consecutive sentences of the State of the Union addresses, from a random one on."""
    sentences = _sentences()
    start = random.randrange(len(sentences))
    return [sentences[i % len(sentences)] for i in range(start, start + size)]


def place(parts: Sequence[str], needles: Iterable[tuple[str, float]], between: str = " ") -> str:
    """Put needles among the parts of a document.

    Args:
        parts: the document, in pieces between which a needle may stand.
        needles: each with its depth, from 0 (start) to 1 (end) of the parts; those of one place keep their order.
        between: what joins them all.

    Returns:
        The document.
    """
    at: dict[int, list[str]] = {}
    for needle, depth in needles:
        at.setdefault(round(depth * len(parts)), []).append(needle)
    pieces: list[str] = []
    for i, part in enumerate(parts):
        pieces += [*at.get(i, ()), part]
    return between.join([*pieces, *at.get(len(parts), ())])


@cache
def _sentences() -> list[str]:
    text = state_of_the_union()
    starts = sentence_starts(text)
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
