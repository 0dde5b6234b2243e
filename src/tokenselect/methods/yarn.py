"""Dense attention with YaRN: low frequencies are stretched, high ones are left, logits become a little sharper.

Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", ICLR 2024 (arXiv 2309.00071);
Transformers' rope type "yarn" with its own ramp and temperature. The factor is the least power of two that holds the
prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from tokenselect.methods.scaled_rotary import prepare, scaled_dense


def attach_yarn(model: nn.Module, on_prefill: Callable[[int, int], None] | None = None) -> AbstractContextManager[None]:
    """See `methods.attach`."""
    return scaled_dense(model, prepare(model, "yarn"), on_prefill)
