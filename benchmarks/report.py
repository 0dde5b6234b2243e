"""Rows of results with everything needed to repeat them."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
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
    path.parent.mkdir(exist_ok=True)
    rows = [{**row, **environment(device)} for row in rows]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name] if spec else [Path(sys.argv[0]).name]


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    read = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{read.get('model name', '?')} (family {read.get('cpu family', '?')}, model {read.get('model', '?')})"
