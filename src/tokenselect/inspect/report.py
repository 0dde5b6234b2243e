"""What was read for an answer, as JSON and as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from tokenselect.trace import Passage, Trace, find_passages

# Control characters of a document must not reach the terminal: they get the pictures that Unicode has of them.
_PICTURES = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_WIDTH = 100


def as_dict(trace: Trace, passages: int) -> dict[str, Any]:
    """What a program needs to know: values of JSON only.

    Args:
        trace: what was recorded.
        passages: how many passages at the most.

    Returns:
        The run's facts, answer, passages, and by layer what was attended and how it was found.
    """
    return {
        "facts": dict(trace.facts),
        "answer": trace.answer,
        "prompt_tokens": trace.num_prompt_tokens,
        "answer_tokens": trace.num_tokens - trace.num_prompt_tokens,
        "recorded_steps": trace.num_steps,
        "passages": [asdict(passage) for passage in find_passages(trace, passages)],
        "layers": [_layer(trace, layer) for layer in range(trace.num_layers)],
    }


def _layer(trace: Trace, layer: int) -> dict[str, Any]:
    cells = [trace.cell(step, layer) for step in range(trace.num_steps)]
    return {
        "layer": int(trace.layers[layer]),
        "attended": _mean(trace.attended()[:, layer]),
        "attended_share": _mean(trace.attended()[:, layer] / trace.available()),
        "vote_share": _mean([trace.votes[cell].sum(dtype=np.float64) for cell in cells if cell.stop > cell.start]),
        "attention_mass": _mean(trace.mass[:, layer][~np.isnan(trace.mass[:, layer])]),
        "reuse_hit_rate": _mean(trace.served[:, layer][trace.served[:, layer] >= 0]),
    }


def _mean(values: Any) -> float | None:
    """None where there is nothing to average."""
    return float(np.mean(values, dtype=np.float64)) if len(values) else None


def as_text(trace: Trace, passages: int) -> str:
    """The same for people: a few lines, without control characters."""
    return "\n".join(_lines(trace, find_passages(trace, passages)))


def _lines(trace: Trace, passages: list[Passage]) -> Iterator[str]:
    yield f"Answer: {_plain(trace.answer)}"
    yield _summary(trace)
    if not passages:
        yield why_nothing(trace)
        return
    yield "\nThe passages that it came from, by the strongest votes for their three strongest tokens:"
    for number, passage in enumerate(passages, 1):
        yield (
            f"\n{number:>2}. tokens {passage.start:,} to {passage.end - 1:,}, depth {passage.depth:.0%}, "
            f"score {passage.score:.2f}: vote {passage.vote:.1%} in layer {passage.layer} "
            f"for {_quoted(trace, passage.token)}, to write {_quoted(trace, trace.num_prompt_tokens + passage.step)}; "
            f"read by {passage.cells:.0%} of layers and steps"
        )
        yield f"    {_shortened(_plain(passage.text))}"


def _summary(trace: Trace) -> str:
    read = f"Read {trace.num_prompt_tokens:,} tokens, wrote {trace.num_tokens - trace.num_prompt_tokens:,}"
    if not trace.num_layers:
        return f"{read}."
    hits = trace.served[trace.served >= 0]
    parts = [f"each of them attended {np.mean(trace.attended() / trace.available()[:, None]):.1%} in the mean layer"]
    if dropped := trace.facts.get("dropped_steps"):
        parts.append(f"the last {dropped:,} are not recorded")
    if len(hits):
        parts.append(f"the Selection Cache served {hits.mean():.0%}")
    if not np.isnan(trace.mass).all():
        parts.append(f"dense attention gives {np.nanmean(trace.mass):.1%} of its mass to what was attended")
    return f"{read}; {'; '.join(parts)}."


def why_nothing(trace: Trace) -> str:
    """Why a trace has no selection."""
    limit = trace.facts["config"].get("num_dense_tokens")
    return (
        f"Nothing was selected: every token attended all tokens before it (a context of at most {limit:,} tokens is "
        "attended whole: num_dense_tokens = 0 selects in any)."
    )


def _quoted(trace: Trace, token: int) -> str:
    return f'"{trace.text_of(token, token + 1).translate(_PICTURES)}"'


def _plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split()).translate(_PICTURES)


def _shortened(text: str) -> str:
    return text if len(text) <= 3 * _WIDTH else f"{text[: 3 * _WIDTH]}..."
