"""Intervals and tests are those of scipy, and of the textbook."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from tokenselect.evals.statistics import mcnemar, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 20), (1, 20), (13, 20), (99, 100), (500, 500)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(right: int, n: int, confidence: float) -> None:
    theirs = binomtest(right, n).proportion_ci(confidence, method="wilson")
    assert wilson(right, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_a_known_case() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe (1998), table I


def test_wilson_takes_shares() -> None:
    low, high = wilson(2.5, 4)
    assert wilson(2, 4).low < low < 2.5 / 4 < high < wilson(3, 4).high


@pytest.mark.parametrize(("total", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_no_samples_can_have(total: float, n: int) -> None:
    with pytest.raises(ValueError, match="total must be between 0 and n"):
        wilson(total, n)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (9, 3), (10, 10), (0, 12)])
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(first: int, second: int) -> None:
    ours = [True] * first + [False] * second + [True, False]
    theirs = [False] * first + [True] * second + [True, False]
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(ours, theirs) == (first, second, pytest.approx(expected))


def test_mcnemar_wants_pairs() -> None:
    with pytest.raises(ValueError, match="the same samples, got 1 and 2"):
        mcnemar([True], [True, False])
