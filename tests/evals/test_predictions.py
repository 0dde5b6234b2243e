"""Answers survive a kill, and are summed up as they were given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tokenselect.config import TokenSelectConfig
from tokenselect.evals.cells import Name, cells_of, metrics
from tokenselect.evals.predictions import Prediction, append, read, settings_of

ONE = Prediction("passkey", 4096, "tokenselect", "", 0, 0.05, "pass key", ("12345",), " 12345", 1.0, 2.5, "cpu")


def test_what_a_kill_cut_is_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "run" / "predictions.jsonl"
    append(file, ONE)
    with file.open("a") as stream:
        stream.write(replace(ONE, number=1).to_line()[:40])
    assert read(file) == [ONE]
    append(file, replace(ONE, number=1))
    assert [one.number for one in read(file)] == [0, 1]


def test_the_first_answer_to_a_question_counts(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    append(file, ONE)
    append(file, replace(ONE, score=0.0))
    assert read(file) == [ONE]
    assert read(tmp_path / "missing.jsonl") == []


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    file.write_text(ONE.to_line() + '{"task": "passkey"}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2: not a prediction"):
        read(file)


def test_settings_are_those_that_differ() -> None:
    assert settings_of(TokenSelectConfig()) == ""
    changed = TokenSelectConfig(num_selected_tokens=64, scoring="distance")
    assert settings_of(changed) == "num_selected_tokens=64 scoring=distance"


def test_cells_are_compared_with_dense_on_the_samples_that_both_have() -> None:
    ours = [replace(ONE, number=i, score=float(i in (0, 1, 2))) for i in range(5)]
    dense = [replace(ONE, number=i, method="dense", score=float(i in (2, 3))) for i in range(4)]
    cells = cells_of([*ours, *dense])
    cell = cells[Name("passkey", 4096, "tokenselect", "")]
    assert (cell.n, cell.score) == (5, 0.6)
    assert cell.against(cells[Name("passkey", 4096, "dense", "")])[:2] == (2, 1)
    assert cell.by_depth() == {0.05: 1.0, 0.15: 0.0, 0.45: 1.0, 0.75: 1.0, 0.85: 0.0}
    row = metrics(cells)[0]
    assert row["against_dense"] == {"only_first": 2, "only_second": 1, "p": 1.0}
    assert row["seconds_per_sample"] == 2.5
