"""InfiniteBench's generated tasks: pass key, number string, key-value retrieval, find a number, run code.

Source: InfiniteBench (Zhang et al., 2024). Haystack, needles and what is asked are its own; random numbers, and where
it leaves no words to complete, the last words of a prompt, are ours. Its samples are of 100,000 tokens and more: here
of any length.
"""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING
from uuid import UUID

from tokenselect.evals.fitting import fit
from tokenselect.evals.question import Question, depth_of, variant_of
from tokenselect.evals.tasks.haystack import noise, place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
    " I will quiz you about the important information there."
)
# What is asked of the numbers of a list, in ascending order and each once.
_RANKS = {
    "largest number": -1,
    "second largest number": -2,
    "third largest number": -3,
    "smallest number": 0,
    "second smallest number": 1,
    "third smallest number": 2,
}


def passkey(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """R.PassKey: a number of five digits in repeated sentences."""
    number = str(Random(f"infinite_passkey {num_tokens} {index}").randrange(10_000, 100_000))
    needle = f"The pass key is {number}. Remember it. {number} is the pass key."
    question = "What is the pass key? The pass key is"
    return _hidden(tokenizer, num_tokens, index, number, needle, question)


def number_string(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """R.Number: ten digits, of which each is repeated."""
    random = Random(f"number_string {num_tokens} {index}")
    number = "".join(str(random.randrange(1, 10)) * 2 for _ in range(5))
    needle = f"The sequence of digits is {number}. Remember it. {number} is the sequence of digits."
    question = "What is the sequence of digits? The sequence of digits is"
    return _hidden(tokenizer, num_tokens, index, number, needle, question)


def kv_retrieval(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """R.KV: the value of one of many keys, all of them UUIDs, in a JSON object."""

    def build(size: int) -> Question:
        random = Random(f"kv_retrieval {num_tokens} {index}")
        pairs = {_uuid(random): _uuid(random) for _ in range(size)}
        asked = list(pairs)[min(size - 1, int(depth_of(index) * size))]
        return Question(
            prompt=(
                f"Extract the value corresponding to the specified key in the JSON object below.\n\n{json.dumps(pairs)}"
                f'\n\nKey: "{asked}"\nThe value associated with the specified key is: "'
            ),
            answers=(pairs[asked],),
            rule="word",
            new_tokens=48,
            needles=(f'"{asked}": "{pairs[asked]}"',),
            depth=depth_of(index),
        )

    return fit(tokenizer, num_tokens, build)


def math_find(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """Math.Find: the largest, the second smallest ... of a list of numbers, whose range differs by sample."""
    rank = list(_RANKS)[variant_of(index, len(_RANKS))]

    def build(size: int) -> Question:
        random = Random(f"math_find {num_tokens} {index}")
        least = random.randrange(500)
        numbers = [random.randrange(least, least + 500) for _ in range(size + 3)]
        return Question(
            prompt=(
                f"Find the {rank} from the list below:\n\n{numbers}\n\nYou should answer with only one number, no"
                f" other words. The {rank} of the list is:"
            ),
            answers=(str(sorted(set(numbers))[_RANKS[rank]]),),
            rule="first_number",
            new_tokens=5,
            wording=rank,
        )

    return fit(tokenizer, num_tokens, build)


def code_run(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """Code.Run: the value of a function that calls others, up to four deep, among many functions."""

    def build(size: int) -> Question:
        random = Random(f"code_run {num_tokens} {index}")
        depth, start = 2 + index % 3, random.randrange(1, 10)
        names = random.sample(range(size + depth), size + depth)
        chain, value = _calls(random, names[:depth], start)
        others = [_function(name, names[(i + 1) % len(names)], random) for i, name in enumerate(names[depth:], depth)]
        document = place(others, [(function, random.random()) for function in chain], between="\n\n")
        call = f"func_{names[0]}({start})"
        return Question(
            prompt=(
                "Following is a set of Python functions. There is a function called named"
                f" func_{names[0]}.\n\n{document}\n\nPlease give me the exact number of the return value of {call}."
                f" The return value of {call} is"
            ),
            answers=(str(value),),
            rule="first_number" if value >= 0 else "last_number",
            new_tokens=8,
            needles=tuple(chain),
        )

    return fit(tokenizer, num_tokens, build)


def _hidden(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int, number: str, needle: str, question: str
) -> Question:
    depth = depth_of(index)

    def build(size: int) -> Question:
        document = place(noise(size), [(needle, depth)])
        prompt = f"{_HIDDEN}\n\n{document}\n\n{question}"
        return Question(prompt, (number,), "first_number", len(number) + 4, (needle,), depth)

    return fit(tokenizer, num_tokens, build)


def _calls(random: Random, names: list[int], start: int) -> tuple[list[str], int]:
    """Functions of which each calls the next, and the value of the first at `start`."""
    added = [random.choice((-1, 1)) * random.randrange(1, 10) for _ in names]
    calls = [
        f"def func_{name}(x):\n    return func_{following}(x) {'+-'[plus < 0]} {abs(plus)}"
        for name, following, plus in zip(names, names[1:], added, strict=False)
    ]
    last = f"def func_{names[-1]}(x):\n    return x {'+-'[added[-1] < 0]} {abs(added[-1])}"
    return [*calls, last], start + sum(added)


def _function(name: int, following: int, random: Random) -> str:
    return f"def func_{name}(x):\n    return func_{following}(x) {random.choice('+-')} {random.randrange(1, 10)}"


def _uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))
