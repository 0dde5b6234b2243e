"""The root mean square norm in Triton against the host's own module."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tokenselect.ops import gpu

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 5, 3584), (3, 64), (1, 7, 100)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = torch.randn(shape[-1], device=DEVICE).to(dtype)
    rows = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    made, expected = gpu.rms_norm(rows, norm.weight.data, 1e-5), norm(rows)
    assert made.dtype == expected.dtype
    one_bit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]  # the sum's order may round on
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=one_bit)
    if DEVICE.type == "cuda" and dtype != torch.float32:  # the interpreter cuts off where the device rounds
        assert float((made != expected).float().mean()) < 0.02
