"""Answers on disk: one line each, written as they come, so that a run that was ended goes on where it stopped."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tokenselect.config import TokenSelectConfig


class Key(NamedTuple):
    """What tells a prediction from others."""

    task: str
    length: int
    method: str
    settings: str
    number: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer, judged.

    Attributes:
        task, length, number: the question: its task, the most tokens of its prompt, its number.
        method, settings: who answered: the method, and the settings that are not the defaults.
        depth, wording, answers: of the question.
        text: what the model wrote.
        score: from 0 (wrong) to 1 (right).
        seconds: that it took, the prompt's reading included.
        device: where.
    """

    task: str
    length: int
    method: str
    settings: str
    number: int
    depth: float | None
    wording: str
    answers: tuple[str, ...]
    text: str
    score: float
    seconds: float
    device: str

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return Key(self.task, self.length, self.method, self.settings, self.number)

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Prediction:
        """The prediction of a line.

        Raises:
            ValueError: it is none.
        """
        values: Any = json.loads(line)
        if not isinstance(values, dict) or set(values) != {item.name for item in fields(cls)}:
            raise ValueError(f"not a prediction: {line[:80]!r}")
        return cls(**{**values, "answers": tuple(values["answers"])})


def append(path: Path, prediction: Prediction) -> None:
    """Add a line in one write, so that several processes may share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, prediction.to_line().encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Prediction]:
    """The predictions of a file, one for each key, in the order of the file; none where there is no file.

    A last line without its end is what a killed process left: it is cut off, so that what comes after it is whole.

    Raises:
        ValueError: a line is no prediction; names the file and the line.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found: dict[Key, Prediction] = {}
    for number, line in enumerate(whole.decode().splitlines(), 1):
        try:
            prediction = Prediction.from_line(line)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        found.setdefault(prediction.key, prediction)
    return list(found.values())


def settings_of(config: TokenSelectConfig) -> str:
    """The settings that differ from the defaults, as "name=value name=value"; empty where none does."""
    own, default = asdict(config), asdict(TokenSelectConfig())
    return " ".join(f"{name}={value}" for name, value in own.items() if value != default[name])
