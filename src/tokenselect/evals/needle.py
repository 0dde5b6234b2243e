"""Needle tests: one number hidden in a long document, asked for at its end.

Prompts are plain text to be completed, no chat: what is judged is whether the far context is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import TYPE_CHECKING

from tokenselect.evals.judging import gives_number
from tokenselect.evals.texts import count_tokens, sentence_starts, state_of_the_union, token_window

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sample:
    """One document with one hidden number, and the question that asks for it.

    `prompt` is the document alone; `question` comes after it and is to be completed; `answer` is the number's
    digits; `depth` is where the needle is, from 0 (start) to 1 (end); `wording` names how it is said and
    asked; `num_tokens` counts what the model reads: `raw_prompt(sample)`; `needle` is the hidden sentence.
    """

    prompt: str
    question: str
    answer: str
    depth: float
    wording: str
    num_tokens: int
    needle: str = ""


@dataclass(frozen=True, slots=True)
class Wording:
    """How a needle is said and asked; both are templates with `{number}` and `{city}`."""

    needle: str
    question: str


# Chosen on dense attention alone, at 7,500 tokens, like the facts below.
PASSKEY_WORDINGS: Mapping[str, Wording] = {
    "pass key": Wording(
        "The pass key is {number}. Remember it. {number} is the pass key.",
        "Remember the pass key. The pass key is",
    ),
    "magic number": Wording(
        "The magic number is {number}. Remember it. {number} is the magic number.",
        "Remember the magic number. The magic number is",
    ),
}

# Chosen on dense attention alone, within the window: at 7,500 tokens it answers the grid 18 times of 20.
FACT_WORDINGS: Mapping[str, Wording] = {
    "magic number": Wording(
        "One of the special magic numbers for {city} is: {number}.",
        "One of the special magic numbers for {city} is:",
    ),
    "5-digit code": Wording(
        "The 5-digit code for {city} is: {number}.",
        "The 5-digit code for {city} is:",
    ),
}

# The same facts asked in other words than they are said: harder, for dense attention too (13 of 20 at 7,500 tokens).
REPHRASED_WORDINGS: Mapping[str, Wording] = {
    "magic number, rephrased": Wording(
        "One of the special magic numbers for {city} is: {number}.",
        "The special magic number for {city} mentioned in the text is",
    ),
    "5-digit code, rephrased": Wording(
        "The 5-digit code for {city} is: {number}.",
        "The 5-digit code for {city} mentioned in the text is",
    ),
}

_ALL_FACTS = {**FACT_WORDINGS, **REPHRASED_WORDINGS}

# None of them is named in the State of the Union addresses.
_CITY_NAMES = """
Oslo Nairobi Kyoto Dakar Riga Tbilisi Accra Montreal Cardiff Perth Zagreb Tallinn Mumbai Osaka Bergen Lyon
Seville Leipzig Graz Basel Utrecht Bristol Leeds Adelaide Brisbane Calgary Lusaka Kampala Amman Krakow
Valencia Nagoya Chennai Rabat Minsk Vilnius Tirana Toulouse Dresden Zurich
"""
CITIES = tuple(_CITY_NAMES.split())

HAYSTACK = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# Its multiples, taken modulo 1, spread evenly however many there are.
_GOLDEN_RATIO = 0.6180339887498949


def raw_prompt(sample: Sample) -> str:
    """The text a model completes: the document, an empty line, the question."""
    return f"{sample.prompt}\n\n{sample.question}"


def is_right(answer_text: str, sample: Sample) -> bool:
    """Whether a completion gives the expected number as its first number; see `judging.gives_number`."""
    return gives_number(answer_text, sample.answer)


def passkey(tokenizer: PreTrainedTokenizerBase, num_tokens: int, depth: float, wording: str, seed: int = 0) -> Sample:
    """A pass key hidden in five sentences repeated over and over.

    Args:
        tokenizer: counts the tokens.
        num_tokens: most tokens of document and question together; from 2,000 on at least 99% of it is used.
        depth: where the key is, from 0 (start) to 1 (end).
        wording: a key of `PASSKEY_WORDINGS`.
        seed: decides the number.

    Returns:
        The sample; equal arguments give equal samples.

    Raises:
        ValueError: unknown wording, depth outside 0 to 1, or no room for the needle in `num_tokens`.

    Source: haystack and first needle are those of InfiniteBench (R.PassKey), which the paper runs; the
    questions are ours, chosen so that a 135M model with dense attention answers them inside its window.
    """
    number = _random_number(seed)
    needle, question = _fill(PASSKEY_WORDINGS, wording, depth, number=number)

    def build(num_sentences: int) -> Sample:
        sentences = list(islice(cycle(HAYSTACK), num_sentences))
        sentences.insert(round(depth * num_sentences), needle)
        return _sample(tokenizer, " ".join(sentences), needle, question, number, depth, wording)

    rounds = 100
    per_round = count_tokens(tokenizer, " ".join(HAYSTACK * rounds)) / rounds
    room = num_tokens - build(0).num_tokens
    return _shrink_to_fit(build, int(room / per_round * len(HAYSTACK)) + 1, num_tokens)


def fact_in_text(
    tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, depth: float, wording: str, seed: int = 0
) -> Sample:
    """One fact about a city hidden between two sentences of a real text.

    Args:
        tokenizer: a fast tokenizer; counts and cuts.
        text: the text the document is cut from.
        num_tokens: most tokens of document and question together; from 2,000 on at least 99% of it is used.
        depth: where the fact is, from 0 (start) to 1 (end), moved to the nearest start of a sentence.
        wording: a key of `FACT_WORDINGS` or `REPHRASED_WORDINGS`.
        seed: decides city, number and the part of the text; consecutive seeds spread over the whole of it.

    Returns:
        The sample; equal arguments give equal samples.

    Raises:
        ValueError: unknown wording, depth outside 0 to 1, or no room for the needle in `num_tokens`.
    """
    number, city = _random_number(seed), CITIES[seed % len(CITIES)]
    needle, question = _fill(_ALL_FACTS, wording, depth, number=number, city=city)

    start = int(len(text) * (seed * _GOLDEN_RATIO % 1))

    def build(window_tokens: int) -> Sample:
        window = token_window(tokenizer, text, window_tokens, start)
        return _sample(tokenizer, _insert(window, needle, depth), needle, question, number, depth, wording)

    room = num_tokens - count_tokens(tokenizer, f"{needle}\n\n{question}")
    return _shrink_to_fit(build, room, num_tokens)


def passkey_grid(tokenizer: PreTrainedTokenizerBase, num_tokens: int, depths: int = 10, seed: int = 0) -> list[Sample]:
    """Pass keys at evenly spread depths, each depth in both wordings, each with its own number.

    Args:
        tokenizer, num_tokens: as in `passkey`.
        depths: how many depths: the middles of equal parts of the document.
        seed: another grid.

    Returns:
        `2 * depths` samples.
    """
    return [passkey(tokenizer, num_tokens, *cell) for cell in _grid(PASSKEY_WORDINGS, depths, seed)]


def fact_grid(
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    depths: int = 10,
    seed: int = 0,
    text: str | None = None,
    wordings: Mapping[str, Wording] = FACT_WORDINGS,
) -> list[Sample]:
    """Facts at evenly spread depths, each depth in both wordings, each in its own document.

    Args:
        tokenizer, num_tokens: as in `fact_in_text`.
        depths: how many depths: the middles of equal parts of the document.
        seed: another grid: other documents and numbers.
        text: where the documents are cut from; None: the State of the Union addresses.
        wordings: `FACT_WORDINGS` or `REPHRASED_WORDINGS`.

    Returns:
        `2 * depths` samples.
    """
    source = state_of_the_union() if text is None else text
    return [fact_in_text(tokenizer, source, num_tokens, *cell) for cell in _grid(wordings, depths, seed)]


def demo_samples(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_depths: int = 5, seed: int = 0
) -> list[Sample]:
    """Documents from the State of the Union addresses, one per depth, with one fact each; wordings in turn.

    Args:
        tokenizer, num_tokens: as in `fact_in_text`.
        num_depths: how many documents.
        seed: other documents and numbers.

    Returns:
        `num_depths` samples, ascending in depth.
    """
    text = state_of_the_union()
    cells = _grid(FACT_WORDINGS, num_depths, seed)
    # Every second depth gets the second wording: cells come in pairs, one pair per depth.
    chosen = [cells[2 * i + i % 2] for i in range(num_depths)]
    return [fact_in_text(tokenizer, text, num_tokens, *cell) for cell in chosen]


def _grid(wordings: Mapping[str, Wording], depths: int, seed: int) -> list[tuple[float, str, int]]:
    """Depth, wording and seed of every cell."""
    cells = [((i + 0.5) / depths, wording) for i in range(depths) for wording in wordings]
    return [(depth, wording, seed * len(cells) + i) for i, (depth, wording) in enumerate(cells)]


def _random_number(seed: int) -> str:
    return str(Random(seed).randrange(10_000, 100_000))


def _fill(wordings: Mapping[str, Wording], wording: str, depth: float, **values: str) -> tuple[str, str]:
    if wording not in wordings:
        raise ValueError(f"wording must be one of {', '.join(map(repr, wordings))}, got {wording!r}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 to 1, got {depth}")
    chosen = wordings[wording]
    return chosen.needle.format(**values), chosen.question.format(**values)


def _sample(
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    needle: str,
    question: str,
    answer: str,
    depth: float,
    wording: str,
) -> Sample:
    num_tokens = count_tokens(tokenizer, f"{document}\n\n{question}")
    return Sample(document, question, answer, depth, wording, num_tokens, needle)


def _insert(text: str, needle: str, depth: float) -> str:
    """Put the needle before the sentence whose start is nearest to the depth."""
    start = min(sentence_starts(text), key=lambda start: abs(start - depth * len(text)))
    return f"{text[:start]}{needle} {text[start:]}"


def _shrink_to_fit(build: Callable[[int], Sample], size: int, num_tokens: int) -> Sample:
    """Build smaller until it fits; the first size is a close guess from above."""
    while size > 0:
        sample = build(size)
        excess = sample.num_tokens - num_tokens
        if excess <= 0:
            return sample
        size -= max(1, excess * size // sample.num_tokens)
    raise ValueError(f"a prompt of {num_tokens} tokens leaves no room for a document around the needle: allow more")
