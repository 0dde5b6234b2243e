"""docs/evaluation.md is what the committed results make it, and hides no cell in which another method is ahead."""

from __future__ import annotations

from benchmarks import evaluation
from benchmarks.ahead import where_ahead
from tokenselect.evals.cells import Cell, Name


def test_the_page_is_made_from_the_results() -> None:
    committed = evaluation.PAGE.read_text(encoding="utf-8") if evaluation.PAGE.exists() else None
    assert evaluation.render() == committed, "run: python -m benchmarks.evaluation"


def test_cells_in_which_another_method_is_ahead_are_named() -> None:
    ours = Cell({0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0})
    cells = {
        Name("niah_multiquery", 16_000, "tokenselect", ""): ours,
        Name("niah_multiquery", 16_000, "tokenselect+forced", ""): Cell(dict.fromkeys(range(4), 1.0)),  # no method
        Name("niah_multiquery", 16_000, "yarn", ""): Cell({0: 0.0, 1: 1.0, 2: 0.5, 9: 1.0}),  # sample 9: not ours
        Name("niah_multiquery", 16_000, "ntk", ""): Cell({0: 1.0, 1: 0.0}),  # as good
        Name("niah_multiquery", 32_000, "yarn", ""): Cell({0: 1.0}),  # nothing to compare with
    }
    section = where_ahead(cells)
    rows = [line for line in section.splitlines() if line.startswith("| niah")]
    assert rows == ["| niah_multiquery | 16,000 | yarn | 3 | 33.3 | 50.0 | 1 : 2 | 1 |"]
    assert section.count("\n- `") == 1
    assert "\n- `niah_multiquery`: " in section
    assert where_ahead(dict.fromkeys(cells, ours)) == ""
