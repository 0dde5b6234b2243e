"""docs/performance.md is what the committed results make it."""

from __future__ import annotations

from benchmarks import performance


def test_the_page_is_made_from_the_results() -> None:
    committed = performance.PAGE.read_text(encoding="utf-8") if performance.PAGE.exists() else None
    assert performance.render() == committed, "run: python -m benchmarks.performance"
