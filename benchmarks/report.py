"""Rows of results with everything needed to repeat them."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", _ROOT / "benchmarks" / "results"))  # elsewhere for trial runs
_CPU = torch.device("cpu")


def environment(device: torch.device = _CPU) -> dict[str, Any]:
    """Processor that the model ran on, versions, commit and command of this run."""
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
        "command": " ".join(["python", "-m", *_module(), *sys.argv[1:]]),
    }


def append_rows(name: str, rows: list[dict[str, Any]], device: torch.device = _CPU) -> Path:
    """Add rows to `results/<name>.csv`; the first row of a new file gives the columns."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**row, **environment(device)} for row in rows]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def put_rows(name: str, rows: list[dict[str, Any]], key: Sequence[str]) -> Path:
    """Write rows to `results/<name>.csv` in place of all that have their keys, so that a run can be continued.

    Args:
        name: of the file.
        rows: with the same columns, to which those of `environment` are added.
        key: columns that tell one measurement, of one or more rows, from another.
    """
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = environment()
    full = [{column: str(value) for column, value in (row | facts).items()} for row in rows]
    replaced = {row_key(row, key) for row in full}
    old = read_rows(name)
    place = next((i for i, row in enumerate(old) if row_key(row, key) in replaced), len(old))
    kept = [row for row in old if row_key(row, key) not in replaced]
    whole = [*kept[:place], *full, *kept[place:]]
    columns = dict.fromkeys(column for row in whole for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(whole)
    return path


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of `results/<name>.csv`; none where there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def known_rows(name: str, key: Sequence[str]) -> set[tuple[str, ...]]:
    """Keys of the rows that this very commit has written."""
    commit = _commit()
    return {row_key(row, key) for row in read_rows(name) if row["commit"] == commit}


def row_key(row: Mapping[str, Any], key: Sequence[str]) -> tuple[str, ...]:
    """What tells a row from others."""
    return tuple(str(row.get(column, "")) for column in key)


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name] if spec else [Path(sys.argv[0]).name]


def _commit() -> str:
    if given := os.environ.get("BENCHMARK_COMMIT"):  # where a copy of the code runs that has no history
        return given
    try:
        # Results that this very run writes do not make its code another one.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, check=True, cwd=_ROOT).stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    read = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{read.get('model name', '?')} (family {read.get('cpu family', '?')}, model {read.get('model', '?')})"
