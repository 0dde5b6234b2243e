"""results/eval.csv: a row is a cell of one machine, with the score of every sample: all else follows from them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.report import read_rows
from tokenselect.evals.cells import Cell, Name
from tokenselect.evals.predictions import Key, Prediction

_FACTS = ("when", "torch", "transformers", "commit", "command")
_MISSING = "-"


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Keep beside the answers where they come from, but for the folder; a run that goes on elsewhere overwrites it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(anywhere(facts), indent=2) + "\n", encoding="utf-8")


def anywhere(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run without the folder that it wrote to, which says nothing elsewhere."""
    return {**facts, "command": re.sub(r" --output[ =]\S+", "", str(facts["command"]))}


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_facts` kept."""
    found: dict[str, Any] = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return found


def merge(predictions: Iterable[Prediction], facts: Mapping[str, Any]) -> Path:
    """Add answers to results/eval.csv; a sample that is there already is replaced.

    Args:
        predictions: the answers.
        facts: versions, commit and command that they come from.

    Returns:
        The file.
    """
    rows = {_key(row): dict(row) for row in read_rows("eval")}
    new: dict[tuple[str, ...], list[Prediction]] = {}
    for one in predictions:
        new.setdefault((one.task, str(one.length), one.method, one.settings, one.device), []).append(one)
    for key, found in new.items():
        scores = scores_of(rows[key]) if key in rows else {}
        scores.update((one.number, one.score) for one in found)
        rows[key] = _row(key, scores, median(one.seconds for one in found), facts)
    path = report.RESULTS / "eval.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        ordered = [rows[key] for key in sorted(rows, key=lambda key: (key[4], key[0], int(key[1]), *key[2:4]))]
        writer = csv.DictWriter(file, list(ordered[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    return path


def scores_of(row: Mapping[str, str]) -> dict[int, float]:
    """The scores of a row by sample."""
    return {i: float(score) for i, score in enumerate(row["scores"].split()) if score != _MISSING}


def cells(device: str) -> dict[Name, Cell]:
    """The cells of results/eval.csv that were run on a device."""
    return {
        Name(row["task"], int(row["length"]), row["method"], row["settings"]): Cell(
            scores_of(row), [float(row["seconds"])]
        )
        for row in read_rows("eval")
        if row["device"] == device
    }


def answered(device: str) -> set[Key]:
    """The answers that results/eval.csv has from a device."""
    return {Key(*name, number) for name, cell in cells(device).items() for number in cell.scores}


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("task", "length", "method", "settings", "device"))


def _row(key: tuple[str, ...], scores: Mapping[int, float], seconds: float, facts: Mapping[str, Any]) -> dict[str, str]:
    names = ("task", "length", "method", "settings", "device")
    row = dict(zip(names, key, strict=True))
    listed = " ".join(f"{scores[i]:g}" if i in scores else _MISSING for i in range(max(scores) + 1))
    return (
        row
        | {"n": str(len(scores)), "seconds": f"{seconds:.3f}"}
        | {n: str(facts[n]) for n in _FACTS}
        | {"scores": listed}
    )
