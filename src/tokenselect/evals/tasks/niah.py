"""RULER's eight needle tasks: special magic numbers, or UUIDs, hidden among noise, in a real text or among their like.

Source: RULER (Hsieh et al., 2024), whose needle, question and answer prefix these are. Its haystack of essays is
replaced by the State of the Union addresses, so those tasks are RULER-style; words and introduction are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from tokenselect.evals.fitting import fit
from tokenselect.evals.question import Question, depth_of
from tokenselect.evals.tasks.haystack import essay, noise, place
from tokenselect.evals.tasks.words import adjective_noun, distinct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["words", "numbers", "uuids"]

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_INTRODUCTION = "Some special magic {kind} are hidden in the text below. Remember them: they will be asked for."
_ONE = (
    "What is the special magic {kind} for {keys} mentioned in the provided text?"
    " The special magic {kind} for {keys} mentioned in the provided text is"
)
_SEVERAL = (
    "What are all the special magic {kind} for {keys} mentioned in the provided text?"
    " The special magic {kind} for {keys} mentioned in the provided text are"
)
_TOKENS_PER_ANSWER = {"numbers": 16, "uuids": 48}


@dataclass(frozen=True, slots=True)
class Niah:
    """One needle task: what is hidden in what, and how much of it is asked for."""

    name: str
    haystack: Literal["noise", "essay", "needles"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __call__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
        """The sample with this number, in a prompt of at most so many tokens."""
        seed = f"{self.name} {num_tokens} {index}"

        def build(size: int) -> Question:
            return self._build(Random(seed), size, depth_of(index))

        return fit(tokenizer, num_tokens, build)

    def _build(self, random: Random, size: int, depth: float) -> Question:
        asked, others = self._needles(random)
        if self.haystack == "noise":
            parts = noise(size)
        elif self.haystack == "essay":
            parts = essay(random, size)
        else:
            parts = [needle for _, _, needle in self._more(random, size)]
        wanted = [needle for _, _, needle in asked]
        depths = [depth, *(random.random() for _ in wanted[1:])]
        document = place(parts, [*zip(wanted, depths, strict=True), *((text, random.random()) for text in others)])
        return Question(
            prompt=f"{_INTRODUCTION.format(kind=self.values)}\n{document}\n{self._question(asked)}",
            answers=tuple(value for _, value, _ in asked),
            rule="all",
            new_tokens=_TOKENS_PER_ANSWER[self.values] * len(asked),
            needles=tuple(wanted),
            depth=depth if len(asked) == 1 else None,
        )

    def _needles(self, random: Random) -> tuple[list[tuple[str, str, str]], list[str]]:
        """Key, value and sentence of those that are asked for, and the sentences of the others."""
        keys = distinct(random, _MAKERS[self.keys], max(self.num_keys, self.num_queries))
        pairs = [(key, _MAKERS[self.values](random)) for key in keys for _ in range(self.num_values)]
        full = [(key, value, self._sentence(key, value)) for key, value in pairs]
        num_asked = self.num_queries * self.num_values
        return full[:num_asked], [sentence for _, _, sentence in full[num_asked:]]

    def _more(self, random: Random, size: int) -> list[tuple[str, str, str]]:
        """A haystack of needles: as alike as can be."""
        pairs = [(_MAKERS[self.keys](random), _MAKERS[self.values](random)) for _ in range(size)]
        return [(key, value, self._sentence(key, value)) for key, value in pairs]

    def _sentence(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.values, key=key, value=value)

    def _question(self, asked: list[tuple[str, str, str]]) -> str:
        keys = list(dict.fromkeys(key for key, _, _ in asked))
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        if len(asked) == 1:
            return _ONE.format(kind=self.values.removesuffix("s"), keys=named)
        return _SEVERAL.format(kind=self.values, keys=named)


def _number(random: Random) -> str:
    return str(random.randrange(1_000_000, 10_000_000))


def _uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))


_MAKERS = {"words": adjective_noun, "numbers": _number, "uuids": _uuid}

NIAH_TASKS = (
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "essay"),
    Niah("niah_single_3", "essay", values="uuids"),
    Niah("niah_multikey_1", "essay", num_keys=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", keys="uuids", values="uuids"),
    Niah("niah_multivalue", "essay", num_values=4),
    Niah("niah_multiquery", "essay", num_keys=4, num_queries=4),
)
