"""vLLM's scheduler, taught where selection blocks begin, so that output depends on the request alone."""

from __future__ import annotations

import math
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.vllm.settings import read_settings, request_settings


class TokenSelectScheduler(Scheduler):
    """Chunks of a prompt end, and prefix-cache hits end, where a selection block ends.

    Blocks of the KV cache are shared only between requests that would have computed them alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._server = read_settings(self.vllm_config)
        self.need_mamba_block_aligned_split = True  # asks `_mamba_block_aligned_split` where chunks end
        manager = self.kv_cache_manager
        self._look_up, self._keep = manager.get_computed_blocks, manager.coordinator.cache_blocks
        manager.get_computed_blocks = self._get_computed_blocks
        manager.coordinator.cache_blocks = self._cache_blocks

    def add_request(self, request: Any) -> None:
        """Let the request share KV blocks with those alone that attend alike."""
        config = self._config(request)
        how = "whole" if self._attends_whole(request) else config.to_json()
        request.cache_salt = f"{request.cache_salt or ''}/tokenselect/{how}"
        request.block_hashes.clear()
        request.update_block_hashes()
        super().add_request(request)

    def _config(self, request: Any) -> TokenSelectConfig:
        params = request.sampling_params
        return request_settings(self._server, params.extra_args if params is not None else None)

    def _attends_whole(self, request: Any) -> bool:
        return bool(request.num_prompt_tokens <= self._config(request).num_dense_tokens)

    def _mamba_block_aligned_split(self, request: Any, num_new_tokens: int, *computed: int) -> int:
        """Tokens of the next chunk, whose end cuts no selection block; 0: there is no room for one now."""
        if self._attends_whole(request):
            return num_new_tokens
        config = self._config(request)
        start: int = request.num_computed_tokens + sum(computed)
        end = start + num_new_tokens
        if end > request.num_prompt_tokens - config.num_tail_tokens:  # from here on each token is a block
            return num_new_tokens
        whole: int = end // config.block_size * config.block_size
        return max(0, whole - start)

    def _get_computed_blocks(self, request: Any, *limits: Any) -> tuple[Any, int, int]:
        blocks, hit, boundary = self._look_up(request, *limits)  # limits: from vLLM 0.33 on
        if self._attends_whole(request):
            return blocks, hit, boundary
        step = math.lcm(self._config(request).block_size, self.block_size)
        whole = hit // step * step
        return self.kv_cache_manager.truncate_computed_blocks(blocks, whole), whole, boundary

    def _cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Keep for others what they would compute alike: not the tail of a prompt, nor what was selected for it."""
        config = self._config(request)
        most = config.num_dense_tokens
        if not self._attends_whole(request):
            most = max(0, request.num_prompt_tokens - config.num_tail_tokens) // config.block_size * config.block_size
        self._keep(request, min(num_computed_tokens, most))
