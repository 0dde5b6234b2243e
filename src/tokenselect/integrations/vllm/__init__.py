"""The vLLM plugin: TokenSelect as an attention backend of an unpatched vLLM.

vLLM calls `register` in each of its processes; nothing happens unless `--attention-backend CUSTOM` selects the backend.
"""

from __future__ import annotations

import functools

BACKEND = "tokenselect.integrations.vllm.backend.TokenSelectBackend"
SCHEDULER = "tokenselect.integrations.vllm.scheduler.TokenSelectScheduler"


@functools.cache  # vLLM may call it several times in one process
def register() -> None:
    """Make the backend known to vLLM as CUSTOM (entry point `vllm.general_plugins`)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from tokenselect.integrations.vllm import admission, cpu_platform, rotary

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    rotary.install()
    cpu_platform.install()
    admission.install()
