"""One engine at a time in this process: vLLM's own processes would hide what tests look into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    from tests.vllm.engines import save_model

    return save_model(tmp_path_factory.mktemp("model"))
