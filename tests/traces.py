"""A trace made by hand: two layers, three steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokenselect.trace import Trace

FACTS: dict[str, Any] = {
    "model": "made",
    "method": "tokenselect",
    "trained_window": 256,
    "config": {"num_sink_tokens": 2, "num_dense_tokens": 0, "num_local_tokens": 8},
    "dropped_steps": 0,
}


def made_trace(text: str | None = None, num_prompt_tokens: int = 100, cells: Any = None, **changes: Any) -> Trace:
    """A trace of tokens that are words; `cells` gives (position, vote) pairs by cell."""
    text = text or " ".join(f"word{i}." if i % 20 == 19 else f"word{i}" for i in range(103))
    starts = [0, *(i for i, sign in enumerate(text) if sign == " ")]
    cells = cells or [[(10, 0.1), (30, 0.2)], [(30, 0.5)], [(50, 0.1)], [], [(10, 0.05)], [(30, 0.25), (90, 0.1)]]
    flat = [pair for cell in cells for pair in cell]
    values: dict[str, Any] = {
        "facts": FACTS,
        "text": text,
        "starts": np.asarray(starts, np.int32),
        "num_prompt_tokens": num_prompt_tokens,
        "layers": np.asarray([0, 5], np.int32),
        "start_loc": np.cumsum([0, *map(len, cells)], dtype=np.int64),
        "indices": np.asarray([position for position, _ in flat], np.int32),
        "votes": np.asarray([vote for _, vote in flat], np.float16),
        "head_shares": np.full((len(flat), 3), 85, np.uint8),
        "windows": np.asarray([[91, 91], [92, 92], [93, 93]], np.int32),
        "served": np.asarray([[-1, -1], [1, 0], [1, 1]], np.int8),
        "mass": np.asarray([[0.5, 0.6], [0.7, 0.8], [0.9, np.nan]], np.float32),
    }
    return Trace(**{**values, **changes})
