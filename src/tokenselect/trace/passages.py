"""Citations: the passages of a prompt that an answer came from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tokenselect.trace.record import Trace

# White space goes to the token after it, so a passage ends before it.
_END = re.compile(r"(?<=[.!?])[\"')\]]*(?=\s)|(?<=[\u3002\uff01\uff1f])|(?=\n)")
_FEWEST_TOKENS = 12
_MOST_TOKENS = 96
_TOKENS_THAT_COUNT = 3


@dataclass(frozen=True, slots=True)
class Passage:
    """A sentence or so of the prompt, and how much was read in it.

    Attributes:
        start: its first token.
        end: one past its last token.
        text: what it says.
        depth: where it begins, from 0 (start of the prompt) to 1 (end).
        score: the strongest votes of its three strongest tokens, added.
        vote: the strongest vote that one of its tokens got from a layer, as a share of that layer's votes.
        token: which token got it.
        step: for which token of the answer.
        layer: from which layer.
        cells: share of layers and steps that selected something in it.
    """

    start: int
    end: int
    text: str
    depth: float
    score: float
    vote: float
    token: int
    step: int
    layer: int
    cells: float


def passage_bounds(trace: Trace) -> list[int]:
    """Tokens at which passages begin, and one past the last: sentences, neither very short nor very long."""
    bounds, end = [0], trace.num_prompt_tokens
    wanted = [match.end() for match in _END.finditer(trace.text)]
    for at in [*np.searchsorted(trace.starts, wanted).tolist(), end]:
        at = min(at, end)
        if at < end and at - bounds[-1] < _FEWEST_TOKENS:
            continue
        while at - bounds[-1] > _MOST_TOKENS:
            bounds.append(bounds[-1] + _MOST_TOKENS)
        if at > bounds[-1]:
            bounds.append(at)
    return bounds


def find_passages(trace: Trace, most: int = 5, steps: Sequence[int] | None = None) -> list[Passage]:
    """The passages that were most selected while the answer was written.

    A token counts by its strongest vote: most layers vote for whatever is near or rare, and the few that look
    something up do so with much of their vote. A passage counts by its three strongest tokens: one alone may be strong
    by chance.

    Args:
        trace: what was recorded.
        most: how many passages at the most.
        steps: tokens of the answer that count; None: all.

    Returns:
        Passages with a vote, the highest score first; of equal ones the first in the text.
    """
    entries = _entries(trace, steps)
    strongest = _strongest_entry(trace, entries)
    votes = np.zeros(trace.num_tokens)
    votes[strongest >= 0] = trace.votes[strongest[strongest >= 0]]
    bounds = passage_bounds(trace)
    spans = [(start, end) for start, end in pairwise(bounds) if votes[start:end].any()]
    spans.sort(key=lambda span: -_score(votes[slice(*span)]))
    return [_passage(trace, start, end, votes, strongest, entries) for start, end in spans[:most]]


def _score(votes: NDArray[np.float64]) -> float:
    return float(np.sort(votes)[-_TOKENS_THAT_COUNT:].sum())


def _entries(trace: Trace, steps: Sequence[int] | None) -> NDArray[np.int64]:
    """Places in `trace.indices` that belong to the steps."""
    if steps is None:
        return np.arange(len(trace.indices))
    return np.flatnonzero(np.isin(trace.cells_of() // trace.num_layers, list(steps)))


def _strongest_entry(trace: Trace, entries: NDArray[np.int64]) -> NDArray[np.int64]:
    """[num_tokens] where each token got its strongest vote; -1: nowhere."""
    ascending = entries[::-1][np.argsort(trace.votes[entries[::-1]], kind="stable")]
    strongest = np.full(trace.num_tokens, -1)
    strongest[trace.indices[ascending]] = ascending  # the last one stays
    return strongest


def _passage(
    trace: Trace,
    start: int,
    end: int,
    votes: NDArray[np.float64],
    strongest: NDArray[np.int64],
    entries: NDArray[np.int64],
) -> Passage:
    token = start + int(votes[start:end].argmax())
    cells = trace.cells_of()
    step, layer = divmod(int(cells[strongest[token]]), trace.num_layers)
    inside = entries[(trace.indices[entries] >= start) & (trace.indices[entries] < end)]
    asked = np.unique(cells[entries] // trace.num_layers).size * trace.num_layers
    return Passage(
        start,
        end,
        trace.text_of(start, end),
        start / trace.num_prompt_tokens,
        _score(votes[start:end]),
        float(votes[token]),
        token,
        step,
        int(trace.layers[layer]),
        np.unique(cells[inside]).size / asked,
    )
