"""Questions on facts about people, one document each: RULER's question answering, made from templates.

Source: the form is that of RULER's qa tasks (Hsieh et al., 2024), which take SQuAD and HotpotQA; documents and
questions are ours, so that everything is made offline and none of it is known to a model: RULER-style.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from tokenselect.evals.fitting import fit
from tokenselect.evals.needle import CITIES
from tokenselect.evals.question import Question, depth_of
from tokenselect.evals.tasks.words import FIRST_NAMES, JOBS, LAST_NAMES, NOUNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INTRODUCTION = "Answer the question based on the given documents. Only give the answer."
_DOCUMENT = (
    "{name} was born in {city} in {year}. After school {name} became a {job} and moved to {home}."
    " In the evenings {name} likes to collect pictures of every {thing}."
)
_QUESTIONS = {
    "city": "In which city was {name} born? Answer: {name} was born in",
    "year": "In which year was {name} born? Answer: {name} was born in the year",
    "job": "What is the profession of {name}? Answer: {name} became a",
    "home": "To which city did {name} move? Answer: {name} moved to",
}
_NEW_TOKENS = 32


def facts_qa(tokenizer: PreTrainedTokenizerBase, num_tokens: int, index: int) -> Question:
    """The sample with this number, in a prompt of at most so many tokens."""

    def build(size: int) -> Question:
        random = Random(f"facts_qa {num_tokens} {index}")
        people = [_person(random) for _ in range(size)]
        asked = people[min(size - 1, int(depth_of(index) * size))]
        # Many share a name before the list is long: the one that is asked for is the only one of its name.
        people = [one for one in people if one is asked or one["name"] != asked["name"]]
        texts = [_DOCUMENT.format(**one) for one in people]
        documents = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
        topic = list(_QUESTIONS)[index % len(_QUESTIONS)]
        question = _QUESTIONS[topic].format(**asked)
        return Question(
            prompt=f"{_INTRODUCTION}\n\n{documents}\n\nQuestion: {question}",
            answers=(asked[topic],),
            rule="part",
            new_tokens=_NEW_TOKENS,
            needles=(_DOCUMENT.format(**asked),),
            depth=depth_of(index),
            wording=topic,
        )

    return fit(tokenizer, num_tokens, build)


def _person(random: Random) -> dict[str, str]:
    return {
        "name": f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}",
        "city": random.choice(CITIES),
        "home": random.choice(CITIES),
        "year": str(random.randrange(1900, 2000)),
        "job": random.choice(JOBS),
        "thing": random.choice(NOUNS),
    }
