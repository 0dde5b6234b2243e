"""Sections of docs/evaluation.md that compare attention with dense attention: fidelity and ablations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from benchmarks.performance import table
from benchmarks.plain_texts import TEXTS
from benchmarks.report import read_rows
from benchmarks.variants.grid import variants
from tokenselect.evals.fidelity import NUM_STEPS, NUM_TAIL, ORACLES, PHASES
from tokenselect.methods import METHODS, choice

FILES = ("fidelity", "fidelity_kl", "ablations")
Row = Mapping[str, str]
_PHASES = f"""A text is read densely, within the trained window; at every layer each method then chooses from dense
attention's own queries and keys, so its figures do not depend on what it did to the layers before. *Prefill*: blocks of
the text; *tail*: the last {NUM_TAIL} tokens of the prompt; *decode*: {NUM_STEPS} single steps after it. *middle*: of
dense attention to tokens outside the default's sinks and local window, the percentage that attended tokens hold.
*error*: distance of the attention output to dense attention's, over its length (root of summed squares), in percent.
"""
_FIDELITY = f"""## Fidelity

{_PHASES}
`{ORACLES[0]}` takes the 512 tokens with most true attention over all heads of a layer, `{ORACLES[1]}` those of each
head (no output is computed for it). A method that attends more than 512 there, such as `snapkv` after the prompt, may
hold more than an oracle. Attended tokens stand at re-indexed positions; what that changes is part of the error, the
oracle's too. Only blocks that a budget does not cover are compared, every so many: where k, the local window or the
block size differ, *prefill* is about other queries, so compare *tail* and *decode* there.
"""
_KL = """### Next-token distributions

Of the whole model run with a method, over the last tokens of each phase: KL divergence from dense attention's
distribution, in nats, and how often the most likely token is the same, in percent.
"""
_ABLATIONS = """## Ablations

One setting of `tokenselect` is changed, all else is as by default. What counts is as under *Fidelity*, on one text;
one text decides nothing by itself: small differences are noise. A larger k or local window has a larger budget.
"""


def fidelity() -> str:
    """Methods by text; empty where nothing was measured."""
    rows = read_rows("fidelity")
    if not rows:
        return ""
    parts = [_FIDELITY]
    for text, length in dict.fromkeys((row["text"], row["length"]) for row in rows):
        own = [row for row in rows if (row["text"], row["length"]) == (text, length)]
        parts.append(f"### {text}, {int(length):,} tokens\n")
        parts.append(_steps(own))
        parts.append(_methods(own) + _unmeasured("Methods", _choosing(), (row["method"] for row in own)))
    parts.append(_unmeasured("Texts", TEXTS, (row["text"] for row in rows)))
    return "\n".join(filter(None, [*parts, *_distributions()]))


def ablations() -> str:
    """Variants of our method; empty where nothing was measured."""
    rows = [row for row in read_rows("ablations") if row["stage"] == "fidelity"]
    if not rows:
        return ""
    lengths = ", ".join(sorted({f"{int(row['length']):,}" for row in rows}))
    steps = _steps(rows)
    note = f"Tokens of the text: {lengths}. No facts and look-ups were measured for variants.\n\n{steps}"
    if any(row["stage"] != "fidelity" for row in read_rows("ablations")):
        note = f"Tokens of the text: {lengths}. Only the stage of fidelity is shown.\n\n{steps}"
    cells = [[row["setting"], row["value"], *_figures(row), _percent(row["hit_rate"])] for row in rows]
    shown = table(("setting", "value", *_head(), "cache hits"), cells, text_columns=2)
    asked = [f"{variant.setting} {variant.value}" for variant in variants()]
    return f"{_ABLATIONS}\n{note}\n{shown}" + _unmeasured(
        "Variants", asked, (f"{row['setting']} {row['value']}" for row in rows)
    )


def _steps(rows: Iterable[Row]) -> str:
    blocks, layers = zip(*((row["block_step"], row["layer_step"]) for row in rows), strict=True)
    return f"Compared: one in {_either(blocks)} of the prompt's blocks, one in {_either(layers)} of the layers.\n"


def _either(steps: Iterable[str]) -> str:
    return " or ".join(sorted(set(steps), key=int))


def _choosing() -> list[str]:
    return [method for method in METHODS if choice(method) is not None]


def _unmeasured(what: str, asked: Iterable[str], found: Iterable[str]) -> str:
    known = set(found)
    missing = [f"`{name}`" for name in asked if name not in known]
    return f"\n{what} not measured here: {', '.join(missing)}.\n" if missing else ""


def _head() -> list[str]:
    return [f"{phase} {figure}" for phase in PHASES for figure in ("middle", "error")]


def _figures(row: Row) -> list[str]:
    return [_percent(row[f"{figure}_{phase}"]) for phase in PHASES for figure in ("middle_mass", "output_error")]


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f}" if share else ""


def _methods(rows: list[Row]) -> str:
    found = {(row["method"], row["phase"]): row for row in rows}
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [found.get((method, phase), {}) for phase in PHASES]
        figures = [_percent(row.get(figure, "")) for row in own for figure in ("middle_mass", "output_error")]
        cells.append([method, *figures])
    return table(("method", *_head()), cells)


def _distributions() -> Iterator[str]:
    rows = read_rows("fidelity_kl")
    if not rows:
        yield "Next-token distributions were not compared.\n"
        return
    found = {(row["text"], row["length"], row["method"], row["phase"]): row for row in rows}
    cells = []
    for text, length, method in dict.fromkeys(key[:3] for key in found):
        own = [found[text, length, method, phase] for phase in PHASES]
        figures = [shown for row in own for shown in (f"{float(row['kl']):.3f}", _percent(row["same_top_token"]))]
        cells.append([text, method, f"{int(length):,}", *figures])
    head = ("text", "method", "tokens", *(f"{phase} {figure}" for phase in PHASES for figure in ("KL", "same")))
    yield _KL + "\n" + table(head, cells, text_columns=2)
