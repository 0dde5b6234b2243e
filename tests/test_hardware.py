"""What the processor is good at decides how attention is computed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from tokenselect.hardware import half_is_slow


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_half_precision_is_slow_without_avx512(monkeypatch: pytest.MonkeyPatch, capability: str, slow: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert half_is_slow(torch.device("cpu")) is slow
    assert not half_is_slow(torch.device("meta"))


_FREE_20_MB = """
import sys, torch
from tokenselect.hardware import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

torch.ones(1 << 10)
before = resident()
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
called = resident()
torch.ones(20 << 20, dtype=torch.uint8)
print(called - before, resident() - called)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back by a threshold")
def test_freed_memory_stays_for_the_next_temporary() -> None:
    def megabytes(how: str) -> list[float]:
        command = [sys.executable, "-c", _FREE_20_MB, how]
        return [float(part) for part in subprocess.check_output(command, text=True).split()]

    (taken, kept), (_, left) = megabytes("keep"), megabytes("leave")
    assert taken < 5  # the call itself holds nothing
    assert kept > 15
    assert left < 5
