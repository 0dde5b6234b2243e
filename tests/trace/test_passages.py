"""Passages are sentences of the prompt, the one with the strongest vote first."""

from __future__ import annotations

import numpy as np
import pytest
from traces import made_trace

from tokenselect.trace import find_passages
from tokenselect.trace.passages import passage_bounds


def test_bounds_are_sentences() -> None:
    assert passage_bounds(made_trace()) == [0, 20, 40, 60, 80, 100]


def test_bounds_of_text_without_sentences() -> None:
    trace = made_trace(" ".join(["word"] * 1003), num_prompt_tokens=1000)
    bounds = passage_bounds(trace)
    assert bounds[0] == 0
    assert bounds[-1] == 1000
    assert (np.diff(bounds) <= 96).all()
    assert (np.diff(bounds) > 0).all()


def test_short_sentences_are_joined() -> None:
    bounds = passage_bounds(made_trace(" ".join(["So."] * 103)))
    assert (np.diff(bounds)[:-1] == 12).all()


def test_the_strongest_passage_is_first() -> None:
    passages = find_passages(made_trace(), most=2)
    assert [(p.start, p.end) for p in passages] == [(20, 40), (0, 20)]
    first = passages[0]
    assert (first.token, first.step, first.layer) == (30, 0, 5)
    assert first.vote == pytest.approx(0.5, rel=1e-3)
    assert first.depth == 0.2
    assert first.cells == pytest.approx(3 / 6)
    assert first.text.split()[0] == "word20"


def test_of_some_steps() -> None:
    assert [p.token for p in find_passages(made_trace(), steps=[1])] == [50]
    assert [p.token for p in find_passages(made_trace(), steps=[2])] == [30, 90, 10]
    assert find_passages(made_trace(), steps=[2])[0].cells == pytest.approx(1 / 2)
    assert find_passages(made_trace(), steps=[]) == []


def test_the_answer_is_no_passage() -> None:
    trace = made_trace(cells=[[(101, 0.9)], [], [], [], [], []])
    assert find_passages(trace) == []
