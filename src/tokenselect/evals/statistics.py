"""How sure a score is, and whether two methods differ."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Two methods on the same samples: how often only one of them was right, and how likely that is by chance."""

    only_first: int
    only_second: int
    p: float


def wilson(total: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share.

    Args:
        total: sum of the scores, each from 0 to 1. With shares among them the interval is too wide rather than too
            narrow: no scores of one mean vary more than zeros and ones.
        n: samples.
        confidence: that the true mean is inside.

    Returns:
        Both ends, within 0 to 1.

    Raises:
        ValueError: no samples, or a sum that they cannot have.
    """
    if n < 1 or not 0 <= total <= n:
        raise ValueError(f"total must be between 0 and n, and n at least 1, got {total} and {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    mean = total / n
    center = mean + z * z / (2 * n)
    spread = z * sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test, two-sided.

    Args:
        first: whether the first method was right, by sample.
        second: the same samples for the second.

    Returns:
        The discordant pairs, and the chance of so uneven ones between equally good methods; 1 where there are none.

    Raises:
        ValueError: not the same number of samples.
    """
    if len(first) != len(second):
        raise ValueError(f"both must have the same samples, got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(comb(n, i) for i in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))
