"""Every test starts alike: no network, one thread, a fixed seed, NaN in memory that nobody has written."""

from __future__ import annotations

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run on the CPU

if TYPE_CHECKING:
    from collections.abc import Iterator

torch.set_num_threads(1)

# Run by `make test-vllm`, in an environment that has vLLM.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm"]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill the result of `torch.empty` and its kin with NaN, so that reading it before writing shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
