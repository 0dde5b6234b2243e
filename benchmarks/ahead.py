"""Of docs/evaluation.md: the cells in which another method scores higher than the default settings, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from benchmarks.performance import table
from tokenselect.evals.cells import BASELINE, Cell, Name
from tokenselect.evals.statistics import mcnemar
from tokenselect.evals.tasks import TASKS

_OURS = "tokenselect"
_HEAD = ("task", "tokens", "method", "samples", "tokenselect", "it", "samples better : worse", "p")
_TEXT = """### Where another method is ahead

Every cell in which another method's mean is higher, over the samples that both answered: means in percent, how many
samples tokenselect answers better and worse, and the exact p of the sign test. `dense` is here within the window only,
where both attend everything and differ by rounding.
"""
# Why, of tasks in which one that does not attend everything is ahead, or was with other settings of ours.
_REASONS = {
    "frequent_words": "the words of the answer are everywhere, so a few hundred tokens show which they are, and the"
    " fewer are attended the better this model counts: dense attention gets worse with every doubling within the"
    " window.",
    "niah_multiquery": "four numbers are asked for, and some of their tokens are not chosen: forced into the selections"
    " of `scoring=mix` they are found as often as YaRN finds them.",
}


def where_ahead(cells: Mapping[Name, Cell]) -> str:
    """The section on one machine's cells; empty where nobody is ahead."""
    rows = list(_rows(cells))
    if not rows:
        return ""
    tasks = {task for task, _, method, *_ in rows if method != BASELINE}
    reasons = [f"- `{task}`: {why}" for task, why in _REASONS.items() if task in tasks]
    return "\n".join([_TEXT, table(_HEAD, rows, text_columns=1), *reasons, *([""] if reasons else [])])


def _rows(cells: Mapping[Name, Cell]) -> Iterator[list[str]]:
    order = list(TASKS)
    for name in sorted((name for name in cells if name.task in TASKS), key=lambda n: (order.index(n.task), *n[1:])):
        ours = cells.get(name._replace(method=_OURS, settings=""))
        if ours is not None and not name.settings and not name.method.startswith(_OURS):
            yield from _row(name, ours.pairs(cells[name]))


def _row(name: Name, pairs: Sequence[tuple[float, float]]) -> Iterator[list[str]]:
    if not pairs or sum(a for a, _ in pairs) >= sum(b for _, b in pairs):
        return
    test = mcnemar([a > b for a, b in pairs], [b > a for a, b in pairs])
    means = [f"{100 * mean(scores):.1f}" for scores in zip(*pairs, strict=True)]
    counts = f"{test.only_first} : {test.only_second}"
    yield [name.task, f"{name.length:,}", name.method, str(len(pairs)), *means, counts, f"{test.p:.2g}"]
