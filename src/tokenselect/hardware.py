"""What the processor is good at."""

from __future__ import annotations

import torch


def half_is_slow(device: torch.device) -> bool:
    """Whether matrix products in bf16 and fp16 are many times slower than in float32: an x86 CPU without AVX-512."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
