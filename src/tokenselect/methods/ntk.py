"""Dense attention with NTK-aware scaling: the base of the rotary embedding grows until the lowest frequency fits.

Source: bloc97, "NTK-Aware Scaled RoPE", 2023; Transformers' rope type "dynamic". The length is the prompt's, rounded
up to a power of two times the trained window, and stays while its answer is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from tokenselect.methods.scaled_rotary import prepare, scaled_dense


def attach_ntk(model: nn.Module, on_prefill: Callable[[int, int], None] | None = None) -> AbstractContextManager[None]:
    """See `methods.attach`."""
    return scaled_dense(model, prepare(model, "dynamic"), on_prefill)
