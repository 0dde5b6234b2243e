"""The generated tasks by name: offline, deterministic, in prompts of any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tokenselect.evals.question import Question
from tokenselect.evals.tasks import counting, facts_qa, infinitebench, needles, niah, tracing


@dataclass(frozen=True, slots=True)
class Task:
    """A generated task.

    Attributes:
        name: as on the command line.
        family: where it comes from; "RULER-style" and "InfiniteBench-style" where a part is not the original's.
        make: from a tokenizer, the most tokens of a prompt and the number of a sample; equal arguments, equal question.
    """

    name: str
    family: str
    make: Callable[[PreTrainedTokenizerBase, int, int], Question]


_OWN, _RULER, _INFINITE = "needles", "RULER-style", "InfiniteBench-style"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("passkey", _OWN, needles.passkey_question),
        Task("fact_union", _OWN, needles.fact_in("union")),
        Task("fact_bible", _OWN, needles.fact_in("bible")),
        Task("fact_novel", _OWN, needles.fact_in("novel")),
        Task("fact_help", _OWN, needles.fact_in("help")),
        Task("fact_code", _OWN, needles.fact_in("code")),
        Task("rephrased_union", _OWN, needles.rephrased_in("union")),
        *(Task(task.name, _RULER, task) for task in niah.NIAH_TASKS),
        Task("variable_tracking", _RULER, tracing.variable_tracking),
        Task("common_words", _RULER, counting.common_words),
        Task("frequent_words", _RULER, counting.frequent_words),
        Task("facts_qa", _RULER, facts_qa.facts_qa),
        Task("infinite_passkey", _INFINITE, infinitebench.passkey),
        Task("number_string", _INFINITE, infinitebench.number_string),
        Task("kv_retrieval", _INFINITE, infinitebench.kv_retrieval),
        Task("math_find", _INFINITE, infinitebench.math_find),
        Task("code_run", _INFINITE, infinitebench.code_run),
    )
}


def find_task(name: str) -> Task:
    """The task with this name.

    Raises:
        ValueError: there is none; the message names them all.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
