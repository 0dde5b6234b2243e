"""The tables of steady steps serve one step at a time, and are free again however it ends. Runs without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import NARROW

from tokenselect.cache import Owner, RawKeyLayer
from tokenselect.integrations.steady import SteadyPass, SteadySteps, Tables
from tokenselect.ops import gpu
from tokenselect.rotary import RotaryTable

CONFIG = NARROW.replace(score_dtype="same")


class Steps:
    """Decode steps of one layer that holds 60 tokens."""

    def __init__(self) -> None:
        owner: Any = Owner(reserve=80, traced=True)
        self.layer = RawKeyLayer(owner)
        self.layer.update(torch.zeros(1, 2, 60, 16), torch.zeros(1, 2, 60, 16))
        backend: Any = gpu
        self.steady = SteadySteps(CONFIG, backend, 200)
        angles = torch.arange(CONFIG.num_positions)[:, None] * torch.ones(8) / 100
        self.table = RotaryTable(angles.cos(), angles.sin(), False, 1.0)

    def begin(self) -> SteadyPass | None:
        return self.steady.begin([self.layer], [0], 60, 61, self.table, lambda: None)


def test_a_step_that_runs_has_the_tables_for_itself() -> None:
    steps = Steps()
    first = steps.begin()
    assert first is not None
    assert steps.begin() is None
    first.end()
    again = steps.begin()
    assert again is not None
    assert again.tables is first.tables


def test_a_step_that_fails_to_begin_leaves_them_free(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    with monkeypatch.context() as broken:
        broken.setattr(Tables, "write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps.begin()
    assert steps.begin() is not None
