"""What was selected is counted, and told for each request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import SETTINGS, answers, engine, prompt
from tokenselect.integrations.vllm import metrics

LAYERS, TOKENS = 2, 6
LENGTHS = [40, 300]  # one is attended whole
COVERED = 64  # queries of the other whose budget covers what comes before them: two blocks
SELECTING = 300 - COVERED + TOKENS - 1


def _counts() -> dict[str, float]:
    counters = [value for name, value in vars(metrics).items() if name.isupper() and not name.startswith("_")]
    samples = [sample for counter in counters for family in counter.collect() for sample in family.samples]
    return {
        "/".join([sample.name.removeprefix("vllm:tokenselect_").removesuffix("_total"), *sample.labels.values()]): (
            sample.value
        )
        for sample in samples
        if sample.name.endswith("_total")
    }


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the plugin logs, by a logger that vLLM does not set up anew with each engine."""
    log = logging.getLogger("tests.vllm")
    monkeypatch.setattr(metrics, "_log", log)
    caplog.set_level(logging.DEBUG, log.name)
    return caplog


def _run(model: Path, **changes: Any) -> dict[str, float]:
    """What one engine counts."""
    before = _counts()
    with engine(model, {**SETTINGS, **changes}) as llm:
        for length in LENGTHS:
            answers(llm, [prompt(length, length)], TOKENS)
        llm.llm_engine.step()  # the scheduler tells the workers that the last one ended
    return {name: value - before[name] for name, value in _counts().items()}


def test_queries_and_tokens_are_counted(model: Path, lines: pytest.LogCaptureFixture) -> None:
    counts = _run(model)
    assert counts["queries/selected"] == SELECTING
    assert counts["selected_tokens"] == SELECTING * SETTINGS["num_selected_tokens"]
    assert counts["dense_fallbacks/short_context"] == 40 + TOKENS - 1
    assert counts["dense_fallbacks/covered"] == COVERED
    assert counts["queries/whole"] == COVERED + 40 + TOKENS - 1
    assert counts["selected_tokens"] < counts["attended_tokens"] < counts["available_tokens"]
    assert counts["selection_seconds"] > 0
    assert counts["cache_lookups"] == counts["cache_hits"] == 0
    ends = [line for line in lines.messages if "ended at" in line]
    averages = [counts[name] / SELECTING for name in ("attended_tokens", "available_tokens")]
    assert "ended at 45 tokens: 0 queries selected" in ends[0]
    told = "{} queries selected, which attended {:.1f} of {:.1f} tokens on average; 0 lookups, 0 hits"
    assert ends[1].endswith("ended at 305 tokens: " + told.format(SELECTING, *averages))


def test_reuse_is_counted(model: Path, lines: pytest.LogCaptureFixture) -> None:
    plain, counts = _run(model), _run(model, reuse_threshold=0.0, reuse_test="flat")
    assert counts["cache_lookups"] == LAYERS * (TOKENS - 1)
    assert 0 < counts["cache_hits"] <= counts["cache_lookups"]
    assert counts["attended_tokens"] > plain["attended_tokens"]  # the local window of a reused selection is longer
    end = lines.messages[-1]
    assert end.endswith(f"; {counts['cache_lookups']:.0f} lookups, {counts['cache_hits']:.0f} hits")
    assert f"attended {counts['attended_tokens'] / SELECTING:.1f} of" in end


def test_an_engine_tells_its_settings_in_one_line(model: Path, lines: pytest.LogCaptureFixture) -> None:
    with engine(model, SETTINGS):
        pass
    (start,) = (line for line in lines.messages if line.startswith("TokenSelect runs on backend"))
    assert '"num_selected_tokens": 16' in start
    assert "\n" not in start
