"""A request with wrong settings is refused when it arrives: the server answers 400."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine.input_processor import InputProcessor

from tokenselect.integrations.vllm.settings import read_settings, request_settings, trace_folder, wants_trace


def install() -> None:
    """Check `vllm_xargs` where vLLM checks its own sampling parameters."""
    original = InputProcessor._validate_params

    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if self.vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM:
            _check(self.vllm_config, params)
        return original(self, params, *args, **kwargs)

    InputProcessor._validate_params = validate


def _check(vllm_config: Any, params: Any) -> None:
    if not isinstance(params, SamplingParams):
        return
    try:
        request_settings(read_settings(vllm_config), params.extra_args)
        wants_trace(trace_folder(vllm_config), params.extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
