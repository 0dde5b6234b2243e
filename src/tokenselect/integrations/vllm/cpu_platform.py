"""The CPU platform answers CPU_ATTN whatever backend is asked for: let it take ours."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def install() -> None:
    """Let `--attention-backend CUSTOM` count on a CPU; other platforms ask the registry themselves."""
    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: type, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM:
            path: str = AttentionBackendEnum.CUSTOM.get_path()
            return path
        host: str = original(cls, selected_backend, *args, **kwargs)
        return host

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
