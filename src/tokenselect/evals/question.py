"""A question about a long text: what a model reads, what it should write, and how that is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenselect.evals.judging import Rule

NUM_DEPTHS = 10


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of a task; plain text to be completed.

    Attributes:
        prompt: everything that the model reads; it ends with what asks for the answer.
        answers: what is right; the rule says whether one or all of them are wanted.
        rule: how an answer is judged; see `judging.judge`.
        new_tokens: the most tokens that the model may write.
        needles: the parts of the prompt that hold the answer; empty where the whole text does.
        depth: where the needle that is asked for lies, from 0 (start) to 1 (end); None where there is no such place.
        wording: how it is said, where a task has several ways.
    """

    prompt: str
    answers: tuple[str, ...]
    rule: Rule
    new_tokens: int
    needles: tuple[str, ...] = ()
    depth: float | None = None
    wording: str = ""


def depth_of(index: int) -> float:
    """The depth of a task's sample: ten depths in turn, so that any ten consecutive samples have all of them.

    Args:
        index: of the sample, from 0.

    Returns:
        The middle of one of ten equal parts; neighbours in the order are far from each other.
    """
    return (index * 7 % NUM_DEPTHS + 0.5) / NUM_DEPTHS


def variant_of(index: int, num_variants: int) -> int:
    """Which of several wordings a sample has: each meets every depth, whatever their number."""
    return (index + index // NUM_DEPTHS) % num_variants
