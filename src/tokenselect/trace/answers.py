"""The trace of an answer, from what its LLM knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tokenselect.config import TokenSelectConfig
from tokenselect.trace.record import Trace, make_trace
from tokenselect.trace.recorder import Recorder
from tokenselect.trace.text import token_texts


def trace_answer(
    recorder: Recorder, tokenizer: Any, model: str, config: TokenSelectConfig, prompt: Sequence[int], new: Sequence[int]
) -> Trace:
    """What a recorder kept of one answer, with the text.

    Args:
        recorder: what was selected.
        tokenizer: of Transformers.
        model: what the caller calls the model.
        config: the settings as the model followed them.
        prompt: tokens that were read.
        new: tokens that were written.
    """
    facts = {
        "model": model,
        "method": "tokenselect",
        "trained_window": recorder.trained_window,
        "config": asdict(config),
    }
    return make_trace(recorder, facts, *token_texts(tokenizer, [*prompt, *new]), len(prompt))
