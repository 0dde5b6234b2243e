"""Whether an answer is right: the rules of the published benchmarks, and a stricter one for numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Rule = Literal["all", "part", "first_number", "last_number", "word"]
RULES: tuple[Rule, ...] = get_args(Rule)

_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_INTEGER = re.compile(r"-?[0-9]+")


def judge(text: str, answers: Sequence[str], rule: Rule) -> float:
    """How right a completion is.

    Args:
        text: what the model wrote.
        answers: what was expected; at least one.
        rule: "all": the share of the answers that occur in the text, letter case ignored; "part": whether one of them
            does; "first_number": whether the first number is the answer; "last_number": whether the last whole number
            is; "word": whether the answer is one of the text's words, which end at white space and punctuation.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: there is no such rule, or no answer.

    Source: "all" and "part" are RULER's string_match_all and string_match_part (Hsieh et al., 2024); "last_number" and
    "word" are those of InfiniteBench for Code.Run and Retrieve.KV (Zhang et al., 2024).
    """
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not answers:
        raise ValueError("answers must not be empty")
    return float(_RULES[rule](text, answers))


def gives_number(text: str, number: str) -> bool:
    """Whether the first number of a text is the expected one.

    Stricter than what the field counts, which is any completion that holds the expected digits somewhere: a later
    number, or the digits inside a longer number, are wrong here.

    Args:
        text: what the model wrote after the question.
        number: its digits.

    Returns:
        True if the whole run of digits of the first number is the expected one, with or without commas between
        thousands. A decimal fraction after it is not looked at: the needle ends with a full stop, after which a
        small model may go on with a digit.
    """
    found = _NUMBER.search(text)
    if found is None:
        return False
    first = found.group().partition(".")[0]
    return (first.replace(",", "") if _THOUSANDS.fullmatch(first) else first) == number


def _all(text: str, answers: Sequence[str]) -> float:
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _part(text: str, answers: Sequence[str]) -> float:
    return any(answer.lower() in text.lower() for answer in answers)


def _first_number(text: str, answers: Sequence[str]) -> float:
    return any(gives_number(text, answer) for answer in answers)


def _last_number(text: str, answers: Sequence[str]) -> float:
    found = _INTEGER.findall(text)
    return bool(found) and found[-1] in answers


def _word(text: str, answers: Sequence[str]) -> float:
    words = re.split(r"[\s.,:;\"'{}()\[\]]+", text)
    return any(answer in words for answer in answers)


_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": _all,
    "part": _part,
    "first_number": _first_number,
    "last_number": _last_number,
    "word": _word,
}
