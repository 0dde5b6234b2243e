"""docs/evaluation.md is what the committed results make it."""

from __future__ import annotations

from benchmarks import evaluation


def test_the_page_is_made_from_the_results() -> None:
    committed = evaluation.PAGE.read_text(encoding="utf-8") if evaluation.PAGE.exists() else None
    assert evaluation.render() == committed, "run: python -m benchmarks.evaluation"
