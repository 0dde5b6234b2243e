"""How an answer is drawn from the model: length, temperature and the like; every default is written here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypedDict


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments that `stream` and `generate` take; see `Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen and when to stop; checked when made.

    Raises:
        ValueError: a value is out of its range; the message names it.
        TypeError: a value is not a number.
    """

    max_new_tokens: int = _option(128, "most tokens of the answer")
    temperature: float = _option(0.0, "0: always the likeliest token; above: sampling, the higher the freer")
    top_p: float = _option(1.0, "sample from the likeliest tokens with this probability in all; 1: all tokens")
    top_k: int = _option(0, "sample from this many likeliest tokens; 0: all")
    repetition_penalty: float = _option(1.0, "above 1: tokens of prompt and answer become less likely")
    seed: int | None = _option(None, "makes sampling repeatable")

    def __post_init__(self) -> None:
        _check_whole("max_new_tokens", self.max_new_tokens, 1)
        _check_whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, 2**63 - 1)
        _check_real("temperature", self.temperature, self.temperature >= 0, "a finite number >= 0")
        _check_real("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        penalty = self.repetition_penalty
        _check_real("repetition_penalty", penalty, penalty > 0, "a finite number > 0")

    def generate_options(self) -> dict[str, Any]:
        """The arguments of Transformers' `generate`; they overrule what a model's files suggest."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


def _check_whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def _check_real(name: str, value: float, in_range: bool, wanted: str) -> None:
    if not (in_range and math.isfinite(value)):
        raise ValueError(f"{name} must be {wanted}, got {value}")
