"""What the YAML files of this folder name: the questions of each generated task, and how an answer is judged."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokenselect.evals.judging import judge
from tokenselect.evals.tasks import TASKS, find_task

if TYPE_CHECKING:
    from collections.abc import Sequence


def questions(
    name: str, *, tokenizer: str, lengths: Sequence[int] = (4096,), samples: int = 100, **other: Any
) -> dict[str, Dataset]:
    """The test split of a generated task.

    Args:
        name: of the task.
        tokenizer: a folder or a name on the hub; counts the tokens.
        lengths: most tokens of a prompt, each with its samples.
        samples: of each length.
        other: what else lm-eval's metadata hold.
    """
    task, counts = find_task(name), _tokenizer(tokenizer)
    docs = [
        asdict(task.make(counts, length, number)) | {"length": length, "number": number}
        for length in lengths
        for number in range(samples)
    ]
    return {"test": Dataset.from_list(docs)}


def judged(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's metric: the score of an answer."""
    return {"score": judge(results[0], doc["answers"], doc["rule"])}


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


# One function per task, under its name, for `!function questions.<name>`.
globals().update({name: partial(questions, name) for name in TASKS})
