"""Contexts within the budget on a GPU, where nothing is selected: a 7B-shaped model with and without TokenSelect.

    python -m benchmarks.gpu_within_budget

Both take turns on the same prompts. Rows go to results/gpu_within_budget.csv.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from statistics import median

import torch

from benchmarks.gpu_model import DEVICE, NUM_WARM, NUM_WRITTEN, SHAPE, build, entered, read, write
from benchmarks.report import append_rows
from tokenselect.config import TokenSelectConfig

METHODS = {"dense": None, "tokenselect": TokenSelectConfig()}
_BUDGET = TokenSelectConfig().budget
LENGTHS = (256, _BUDGET - NUM_WARM - NUM_WRITTEN)
_ROUNDS = 7


def main() -> None:
    """Measure prompts and the tokens after them."""
    model = build()
    times: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for turn in range(_ROUNDS + 1):  # the first warms up
        for length, name in product(LENGTHS, [*METHODS][:: 1 if turn % 2 else -1]):
            ids = torch.randint(0, 150_000, (1, length), device=DEVICE)
            with entered(model, METHODS[name]):
                read(model, ids)  # what is made once, when a model is entered
                cache, token, seconds = min((read(model, ids) for _ in range(3)), key=lambda made: made[2])
                steps, _ = write(model, token, cache)
            if turn:
                times[name, length, "prefill"].append(seconds * 1e3)
                times[name, length, "decode"].append(median(steps))
    rows: list[dict[str, object]] = []
    for length, phase in product(LENGTHS, ("prefill", "decode")):
        for name in METHODS:
            own = times[name, length, phase]
            case = {"shape": SHAPE, "method": name, "length": length, "phase": phase}
            rows.append(case | {"p50_ms": round(median(own), 3)})
            rows[-1]["times_ms"] = " ".join(f"{ms:.2f}" for ms in own)
            print(rows[-1], flush=True)
    append_rows("gpu_within_budget", rows, DEVICE)


if __name__ == "__main__":
    main()
