"""What the processor is good at decides how attention is computed."""

from __future__ import annotations

import pytest
import torch

from tokenselect.hardware import half_is_slow


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_half_precision_is_slow_without_avx512(monkeypatch: pytest.MonkeyPatch, capability: str, slow: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert half_is_slow(torch.device("cpu")) is slow
    assert not half_is_slow(torch.device("meta"))
