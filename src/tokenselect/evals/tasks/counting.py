"""RULER's aggregation tasks: which words of a list are the most frequent.

Source: RULER (Hsieh et al., 2024): common words (10 words 30 times among words 3 times) and frequent words (made-up
words by a power law with exponent 2, the three most frequent). Its word list is replaced by the vocabulary of the
State of the Union addresses, and the wording is ours: RULER-style.
"""

from __future__ import annotations

from random import Random
from string import ascii_lowercase
from typing import TYPE_CHECKING

from tokenselect.evals.fitting import fit
from tokenselect.evals.question import Question
from tokenselect.evals.tasks.words import distinct, vocabulary
from tokenselect.evals.texts import state_of_the_union

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMMON, _TIMES = 10, (30, 3)
_SHORT, _SHORT_TIMES = 4096, (10, 1)  # thirty times each would not fit
_EXAMPLE = (3, 4, 1, 12)  # common words, their times, times of the others, others
_FREQUENT, _EXPONENT, _CODED_LETTERS, _WORDS_PER_CODE = 3, 2.0, 6, 50
_LIST = "Below is a numbered list of words. Remember the ones that appear most often."
_ASK_LIST = "Question: What are the {count} most common words in the above list? Answer: The top {count} words are:"
_CODED = "Read the following coded text and track how often each coded word appears."
_ASK_CODED = (
    "Question: Do not provide any explanation. What are the three most frequently appearing words in the above coded"
    " text? Answer: According to the coded text above, the three most frequently appearing words are:"
)


def common_words(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """The sample with this number, in a prompt of at most so many tokens; a worked example comes first."""
    words = vocabulary(state_of_the_union())
    times = _TIMES if num_tokens >= _SHORT else _SHORT_TIMES

    def build(size: int) -> Question:
        random = Random(f"common_words {num_tokens} {index}")
        example, known = _list(random, words, *_EXAMPLE)
        text, wanted = _list(random, words, _COMMON, *times, size)
        shown = " ".join(f"{i}. {word}" for i, word in enumerate(known, 1))
        return Question(f"{example} {shown}\n\n{text}", tuple(wanted), "all", 120)

    return fit(tokenizer, num_tokens, build)


def _list(
    random: Random, words: tuple[str, ...], num_common: int, times: int, other_times: int, size: int
) -> tuple[str, list[str]]:
    chosen = random.sample(words, min(num_common + size, len(words)))
    common, others = chosen[:num_common], chosen[num_common:]
    listed = common * times + others * other_times
    random.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return f"{_LIST}\n{numbered}\n{_ASK_LIST.format(count=num_common)}", common


def frequent_words(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """The sample with this number, in a prompt of at most so many tokens."""

    def build(size: int) -> Question:
        random = Random(f"frequent_words {num_tokens} {index}")
        kinds = max(_FREQUENT + 1, size // _WORDS_PER_CODE)
        coded = distinct(random, lambda source: "".join(source.choices(ascii_lowercase, k=_CODED_LETTERS)), kinds)
        weights = [rank**-_EXPONENT for rank in range(1, kinds + 1)]
        counts = [max(1, round(size * weight / sum(weights))) for weight in weights]
        listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        random.shuffle(listed)
        return Question(f"{_CODED}\n{' '.join(listed)}\n{_ASK_CODED}", tuple(coded[:_FREQUENT]), "all", 50)

    return fit(tokenizer, num_tokens, build)
