"""What is evaluated, most important first: read by `benchmarks.evaluate` where no tasks are named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Part:
    """Cells that are run together: every task at every length with every method, samples `first .. last - 1`.

    `settings` are "name=value", in place of the defaults.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    methods: Sequence[str]
    last: int
    first: int = 0
    settings: Sequence[str] = ()

    def cells(self, method: str) -> Iterator[tuple[str, int]]:
        """Task and length of each cell of a method."""
        return ((task, length) for length in self.lengths for task in self.tasks)

    def only(self, methods: Sequence[str]) -> Part:
        """The part with no other methods than these."""
        return replace(self, methods=[method for method in self.methods if method in methods])


# A prompt of 8,000 tokens and its answer fit a window of 8,192.
WITHIN = (2000, 4000, 8000)
BEYOND = (16_000, 32_000, 64_000)
NEEDLES = ("passkey", "fact_union", "fact_bible")
RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "facts_qa",
)
INFINITE = ("infinite_passkey", "number_string", "kv_retrieval", "math_find", "code_run")
OURS = ("tokenselect", "tokenselect+select")
BOTH = ("dense", "tokenselect")
CEILING = ("tokenselect", "tokenselect+forced")
# Of RULER and InfiniteBench, what dense attention answers more than once in five within its window.
ANSWERED = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
    "infinite_passkey",
    "number_string",
)
_QUICK = ("yarn", "ntk", "paper", "snapkv", "streaming", "streaming_same_window", "dense")
_SLOW = ("infllm", "quest", "published", "self_extend")  # plain definitions that loop: seconds to minutes a sample
_WORDINGS = ("fact_help", "fact_code", "rephrased_union")
_COMPARED = ("fact_union", "fact_bible", "rephrased_union", "passkey")
_FEW_WORDS = ("number_string", "niah_single_1", "niah_single_2", "niah_multikey_1", "infinite_passkey")  # of ANSWERED
_MORE_WORDS = ("niah_single_3", "niah_multivalue", "niah_multiquery")  # three times as long to answer
_OTHER_TEXTS = ("fact_help", "fact_code")
_RIVALLED = ("niah_single_3", "niah_multiquery", "niah_multivalue", "niah_multikey_1")

PLAN = (
    Part(NEEDLES, WITHIN, ("dense", *OURS), 20),
    Part(NEEDLES, BEYOND, CEILING, 20),
    Part(NEEDLES, BEYOND[:1], _QUICK, 20),
    Part((*RULER, *INFINITE), WITHIN[1:], BOTH, 20),
    Part(("passkey",), BEYOND[:1], ("tokenselect",), 100, 20),
    Part(NEEDLES, WITHIN, BOTH, 100, 20),
    Part(("fact_union", "fact_bible"), BEYOND[:1], CEILING, 100, 20),
    Part(ANSWERED, WITHIN[1:], BOTH, 100, 20),
    Part(NEEDLES, BEYOND[1:], _QUICK, 20),
    Part(_COMPARED, BEYOND[:2], ("tokenselect",), 100),
    Part(ANSWERED, BEYOND[:1], ("tokenselect", *_QUICK), 20),
    Part(ANSWERED, BEYOND[1:2], ("tokenselect",), 20),
    Part(_COMPARED, BEYOND[2:], ("tokenselect",), 20),
    Part(_FEW_WORDS, BEYOND[:1], ("tokenselect",), 100),
    Part(_FEW_WORDS, BEYOND[1:2], ("tokenselect",), 100),
    Part(_MORE_WORDS, BEYOND[:1], ("tokenselect",), 100),
    Part(_MORE_WORDS, BEYOND[1:2], ("tokenselect",), 100),
    Part(ANSWERED, BEYOND[1:2], _QUICK, 20),
    Part(_OTHER_TEXTS, (8000,), BOTH, 20),
    Part(_OTHER_TEXTS, BEYOND[:2], ("tokenselect",), 100),
    # Where another method is ahead on twenty samples.
    Part(_RIVALLED, BEYOND[1:2], ("yarn", "paper"), 100),
    Part(_RIVALLED[:2], BEYOND[:1], ("yarn",), 100),
    Part(_WORDINGS, BEYOND[:2], CEILING, 20),
    Part(_RIVALLED, BEYOND[:2], CEILING, 100),
    Part((*RULER, *INFINITE), WITHIN[1:], BOTH, 100, 20),
    Part(NEEDLES, BEYOND[:1], _SLOW, 20),
    Part(_WORDINGS, (8000,), ("dense", *OURS), 20),
    Part(_WORDINGS, BEYOND, CEILING, 20),
    Part((*RULER, *INFINITE), BEYOND[:2], ("tokenselect", *_QUICK), 20),
    Part(RULER, WITHIN[1:], ("tokenselect+select",), 100),
    Part(NEEDLES, BEYOND[1:], _SLOW, 20),
    Part((*RULER, *INFINITE), BEYOND[:2], _SLOW, 20),
)
