"""Pass keys in repeated sentences and facts in real texts: our own needle tests, one number each."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tokenselect.evals.library import text_named
from tokenselect.evals.needle import (
    FACT_WORDINGS,
    PASSKEY_WORDINGS,
    REPHRASED_WORDINGS,
    Sample,
    fact_in_text,
    passkey,
    raw_prompt,
)
from tokenselect.evals.question import Question, depth_of, variant_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedTokenizerBase

    from tokenselect.evals.needle import Wording

_NEW_TOKENS = 8  # of a number of five digits, and what a model may say before it


def passkey_question(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """A pass key in five repeated sentences; see `needle.passkey`."""
    names = list(PASSKEY_WORDINGS)
    wording = names[variant_of(index, len(names))]
    sample = passkey(tokenizer, num_tokens, depth_of(index), wording, _seed("passkey", num_tokens, index))
    return _question(sample)


def fact_question(
    wordings: Mapping[str, Wording], text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int
) -> Question:
    """A fact about a city in a real text; see `needle.fact_in_text`."""
    names = list(wordings)
    wording = names[variant_of(index, len(names))]
    sample = fact_in_text(
        tokenizer, text_named(text), num_tokens, depth_of(index), wording, _seed(f"fact {text}", num_tokens, index)
    )
    return _question(sample)


def fact_in(text: str) -> Callable[[PreTrainedTokenizerBase, int, int], Question]:
    """Makes questions on facts in one text, asked as they are said."""
    return partial(fact_question, FACT_WORDINGS, text)


def rephrased_in(text: str) -> Callable[[PreTrainedTokenizerBase, int, int], Question]:
    """Makes questions on facts in one text, asked in other words than they are said."""
    return partial(fact_question, REPHRASED_WORDINGS, text)


def _seed(name: str, num_tokens: int, index: int) -> int:
    """Another number, city and part of the text for each task, length and sample."""
    return Random(f"{name} {num_tokens} {index}").randrange(2**31)


def _question(sample: Sample) -> Question:
    return Question(
        prompt=raw_prompt(sample),
        answers=(sample.answer,),
        rule="first_number",
        new_tokens=_NEW_TOKENS,
        needles=(sample.needle,),
        depth=sample.depth,
        wording=sample.wording,
    )
