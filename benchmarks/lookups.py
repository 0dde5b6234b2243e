"""Answers that need several look-ups while they are written: three facts, asked one after the other.

The right answer is fed token by token, as in decoding, and every digit is guessed before it is told. So each question
sends the model to another place of the document within one answer, under whatever selection decoding keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import DynamicCache

from tokenselect.evals.needle import CITIES, FACT_WORDINGS
from tokenselect.evals.texts import sentence_starts, state_of_the_union, token_window
from tokenselect.integrations.cache_name import CACHE
from tokenselect.models import LoadedModel
from tokenselect.stats import Counts

_DEPTHS = (0.2, 0.5, 0.8)
_WORDINGS = ("5-digit code", "magic number", "5-digit code")
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Lookups:
    """A document with three facts.

    Attributes:
        prompt: the document and the first question.
        answer: what is fed after it: numbers and further questions.
        numbers: first and one past the last character of each number in `prompt + answer`.
    """

    prompt: str
    answer: str
    numbers: tuple[tuple[int, int], ...]


def lookups(loaded: LoadedModel, num_tokens: int, seed: int) -> Lookups:
    """Three facts in a State of the Union address; the order in which they are asked changes with the seed."""
    random, text = Random(seed), state_of_the_union()
    facts = []
    for i, wording in enumerate(_WORDINGS):
        fill = {"city": CITIES[(3 * seed + i) % len(CITIES)], "number": str(random.randrange(10_000, 100_000))}
        facts.append(
            (FACT_WORDINGS[wording].needle.format(**fill), FACT_WORDINGS[wording].question.format(**fill), fill)
        )
    document = token_window(loaded.tokenizer, text, num_tokens - 200, int(len(text) * (seed * _GOLDEN_RATIO % 1)))
    starts = sentence_starts(document)
    for depth, (needle, _, _) in sorted(zip(_DEPTHS, facts, strict=True), reverse=True):
        start = min(starts, key=lambda start: abs(start - depth * len(document)))
        document = f"{document[:start]}{needle} {document[start:]}"
    random.shuffle(facts)
    whole, numbers = f"{document}\n\n{facts[0][1]}", []
    end = len(whole)
    for i, (_, question, fill) in enumerate(facts):
        whole += f"\n\n{question}" if i else ""
        numbers.append((len(whole) + 1, len(whole) + 6))
        whole += f" {fill['number']}."
    return Lookups(whole[:end], whole[end:], tuple(numbers))


@torch.no_grad()
def look_up(loaded: LoadedModel, task: Lookups) -> dict[str, Any]:
    """Guess the digits of all numbers; the model has been entered already.

    Returns:
        Numbers and digits that were right, and how many there are; how often decode steps asked the Selection Cache
        ("lookups", once a layer), and its hits.
    """
    model, text = loaded.model, task.prompt + task.answer
    encoded = loaded.tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor([encoded["input_ids"]], device=model.device)
    spans = encoded["offset_mapping"]
    first = next(i for i, (_, end) in enumerate(spans) if end > len(task.prompt))
    cache = DynamicCache(config=model.config)
    logits = model(ids[:, :first], **{CACHE: cache}, logits_to_keep=1).logits
    guesses = {first: int(logits[0, -1].argmax())}
    before = Counts.of(cache)
    for at in range(first, ids.shape[1] - 1):
        guesses[at + 1] = int(model(ids[:, at : at + 1], **{CACHE: cache}).logits[0, -1].argmax())
    counts = Counts.of(cache).since(before)
    right = [
        [guesses[i] == int(ids[0, i]) for i in range(first, len(spans)) if spans[i][0] < end and spans[i][1] > start]
        for start, end in task.numbers
    ]
    return {
        "right": sum(map(all, right)),
        "n": len(right),
        "digits_right": sum(map(sum, right)),
        "digits": sum(map(len, right)),
        "hits": counts.hits,
        "lookups": counts.lookups,
    }
