"""JSON for programs, text for terminals: the same passages, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from traces import FACTS, made_trace

from tokenselect.inspect import as_dict, as_text


def test_json() -> None:
    found = json.loads(json.dumps(as_dict(made_trace(), 2)))
    assert [passage["start"] for passage in found["passages"]] == [20, 0]
    assert (found["prompt_tokens"], found["answer_tokens"], found["recorded_steps"]) == (100, 3, 3)
    first, second = found["layers"]
    assert (first["layer"], second["layer"]) == (0, 5)
    assert first["attended"] == pytest.approx(np.mean([2 + 2 + 9, 2 + 1 + 9, 2 + 1 + 9]))
    assert first["vote_share"] == pytest.approx(np.mean([0.3, 0.1, 0.05]), rel=1e-3)
    assert first["attention_mass"] == pytest.approx(0.7)
    assert second["attention_mass"] == pytest.approx(0.7)  # where it is known
    assert first["reuse_hit_rate"] == 1.0
    assert second["reuse_hit_rate"] == 0.5


def test_text() -> None:
    text = as_text(made_trace(), 2)
    assert "Read 100 tokens, wrote 3" in text
    assert re.search(r'1\. tokens 20 to 39, depth 20%, score 0\.50: vote 50\.0% in layer 5 for " word30"', text)
    assert text.index("word20") < text.index("word0 ")
    assert "the Selection Cache served 75%" in text


def test_a_document_cannot_steer_the_terminal() -> None:
    words = ["\x1b[2J\x1b]0;title\x07", "\x9b31m", "\r", "\x7f", "plain."]
    trace = made_trace(" ".join(words[i % 5] for i in range(103)))
    text = as_text(trace, 5)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "␛" in text


def test_nothing_selected() -> None:
    facts = {**FACTS, "config": {**FACTS["config"], "num_dense_tokens": 8192}}
    trace = made_trace(
        facts=facts,
        layers=np.zeros(0, np.int32),
        start_loc=np.zeros(1, np.int64),
        indices=np.zeros(0, np.int32),
        votes=np.zeros(0, np.float16),
        head_shares=np.zeros((0, 0), np.uint8),
        windows=np.zeros((3, 0), np.int32),
        served=np.zeros((3, 0), np.int8),
        mass=np.zeros((3, 0), np.float32),
    )
    assert "at most 8,192 tokens is attended whole" in as_text(trace, 3)
    assert as_dict(trace, 3)["passages"] == []


def test_what_was_not_kept_is_said() -> None:
    assert "the last 7 are not recorded" in as_text(made_trace(facts={**FACTS, "dropped_steps": 7}), 1)
