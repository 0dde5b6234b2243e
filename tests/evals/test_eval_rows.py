"""results/eval.csv keeps every score; docs/evaluation.md is what the committed results make it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import eval_rows, evaluate, evaluation, report
from benchmarks.evaluate import Job, with_settings
from benchmarks.evaluation_plan import PLAN, Part
from tokenselect.config import TokenSelectConfig
from tokenselect.evals.cells import Name
from tokenselect.evals.predictions import Key, Prediction
from tokenselect.methods import METHODS
from tokenselect.models import LoadedModel

ONE = Prediction("passkey", 4000, "tokenselect", "", 0, 0.05, "pass key", ("12345",), " 12345", 1.0, 2.5, "a GPU")
FACTS = {"when": "2026-01-01", "torch": "2", "transformers": "5", "commit": "abc", "command": "python"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_scores_come_back_as_they_were(results: Path) -> None:
    some = [replace(ONE, number=i, score=score) for i, score in ((0, 1.0), (3, 0.25))]
    dense = [replace(one, method="dense", score=1 - one.score) for one in some]
    eval_rows.merge([*some, *dense], FACTS)
    eval_rows.merge([replace(ONE, number=2, score=0.0), replace(ONE, length=8000)], FACTS)
    cells = eval_rows.cells("a GPU")
    assert cells[Name("passkey", 4000, "tokenselect", "")].scores == {0: 1.0, 2: 0.0, 3: 0.25}
    assert cells[Name("passkey", 4000, "dense", "")].scores == {0: 0.0, 3: 0.75}
    assert len(cells) == 3
    assert eval_rows.cells("another") == {}


def test_a_page_has_every_cell(results: Path) -> None:
    assert evaluation.render() is None
    ours = [replace(ONE, number=i, score=float(i < 9)) for i in range(10)]
    dense = [replace(ONE, number=i, method="dense", score=float(i > 7)) for i in range(10)]
    eval_rows.merge([*ours, *dense], FACTS)
    page = evaluation.render()
    assert page is not None
    assert "| passkey | 4,000 | **20** (6-51), 10 | **90** (60-98), 10; +8 -1, p 0.039 |" in page


def test_a_setting_is_read_from_its_text() -> None:
    changed = with_settings(TokenSelectConfig(), ["num_selected_tokens=64", "scoring=distance", "head_weights=true"])
    assert changed == TokenSelectConfig(num_selected_tokens=64, scoring="distance", head_weights=True)
    with pytest.raises(ValueError, match="unknown setting 'k'"):
        with_settings(TokenSelectConfig(), ["k=3"])


def test_what_is_collected_is_answered(results: Path) -> None:
    eval_rows.merge([ONE, replace(ONE, number=3, settings="num_tail_tokens=0")], FACTS)
    assert eval_rows.answered("a GPU") == {ONE.key, ONE.key._replace(number=3, settings="num_tail_tokens=0")}
    assert eval_rows.answered("another") == set()


def test_every_method_is_planned() -> None:
    assert {method.partition("+")[0] for part in PLAN for method in part.methods} == set(METHODS)


def test_processes_share_a_plan_out(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(("passkey", "fact_union"), (4000, 8000), ("dense", "tokenselect"), 7, settings=("num_tail_tokens=0",))
    eval_rows.merge([replace(ONE, settings="num_tail_tokens=0"), replace(ONE, method="dense", number=4)], FACTS)
    asked: list[Key] = []

    def answer(job: Job, loaded: object, method: str, config: TokenSelectConfig, todo: list[Key], device: str) -> bool:
        assert config.num_tail_tokens == 0
        assert all(key.method == method for key in todo)
        asked.extend(todo)
        return True

    monkeypatch.setattr(Job, "_answer", answer)
    monkeypatch.setattr(evaluate, "environment", lambda device: {"device": "a GPU"})
    loaded = LoadedModel(SimpleNamespace(device="a GPU"), None, "", 0)  # type: ignore[arg-type]
    for number in range(3):
        Job([part], TokenSelectConfig(), results, 0.0, number, 3, missing=True).run(loaded)
    assert len(asked) == len(set(asked)) == 2 * 4 * 7 - 2
    assert {key.settings for key in asked} == {"", "num_tail_tokens=0"}
