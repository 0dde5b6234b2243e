"""Answers are judged as the benchmarks judge them."""

from __future__ import annotations

import pytest

from tokenselect.evals.judging import RULES, Rule, judge


@pytest.mark.parametrize(
    ("rule", "text", "answers", "score"),
    [
        ("all", "They are ABC and xyz.", ["abc", "XYZ"], 1.0),
        ("all", "Only abc.", ["abc", "xyz", "uvw", "rst"], 0.25),
        ("all", "", ["abc"], 0.0),
        ("part", "in Oslo, of course", ["Riga", "oslo"], 1.0),
        ("part", "in Bergen", ["Riga", "oslo"], 0.0),
        ("first_number", " 12345. 99999", ["12345"], 1.0),
        ("first_number", " 99999, not 12345", ["12345"], 0.0),
        ("first_number", " 123456", ["12345"], 0.0),
        ("first_number", " 12,345 it is", ["12345"], 1.0),
        ("last_number", "first 3, then -7", ["-7"], 1.0),
        ("last_number", "it is 7.", ["-7"], 0.0),
        ("last_number", "none", ["7"], 0.0),
        ("word", 'ab-12", "cd-34"', ["ab-12"], 1.0),
        ("word", "ab-123", ["ab-12"], 0.0),
    ],
)
def test_a_rule(rule: Rule, text: str, answers: list[str], score: float) -> None:
    assert judge(text, answers, rule) == score


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_right_without_an_answer(rule: Rule) -> None:
    assert judge("", ["1"], rule) == 0
    with pytest.raises(ValueError, match="answers must not be empty"):
        judge("1", [], rule)


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of all, .*, got 'some'"):
        judge("1", ["1"], "some")  # type: ignore[arg-type]
