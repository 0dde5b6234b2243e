"""RULER's variable tracking: a value passed on from variable to variable, in repeated sentences.

Source: RULER (Hsieh et al., 2024), variable tracking with one chain of four hops; the worked example before it, as
there, shows what is asked. The wording of the introduction is ours.
"""

from __future__ import annotations

from random import Random
from string import ascii_uppercase
from typing import TYPE_CHECKING

from tokenselect.evals.fitting import fit
from tokenselect.evals.question import Question
from tokenselect.evals.tasks.haystack import noise, place
from tokenselect.evals.tasks.words import distinct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOPS = 4
_EXAMPLE_SENTENCES = 10
_NEW_TOKENS = 30
_INTRODUCTION = "Remember the variable assignments that are hidden in the following text."
_QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the"
    " value {value}, they are:"
)


def variable_tracking(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """The sample with this number, in a prompt of at most so many tokens."""

    def build(size: int) -> Question:
        random = Random(f"variable_tracking {num_tokens} {index}")
        example, names, _ = _chain(random, _EXAMPLE_SENTENCES)
        text, asked, needles = _chain(random, size)
        return Question(
            prompt=f"{example} {' '.join(names)}\n\n{text}",
            answers=tuple(asked),
            rule="all",
            new_tokens=_NEW_TOKENS,
            needles=tuple(needles),
        )

    return fit(tokenizer, num_tokens, build)


def _chain(random: Random, size: int) -> tuple[str, list[str], list[str]]:
    """A text with its question, the variables, and the assignments."""
    names = distinct(random, lambda source: "".join(source.choices(ascii_uppercase, k=5)), _HOPS + 1)
    value = str(random.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    lines = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    depths = sorted(random.random() for _ in lines)
    text = place(noise(size), zip(lines, depths, strict=True), between="\n")
    question = _QUESTION.format(value=value, count=len(names))
    return f"{_INTRODUCTION}\n{text}\n{question}", names, lines
