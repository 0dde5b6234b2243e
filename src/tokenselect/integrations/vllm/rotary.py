"""RoPE is handed over: vLLM's layers leave queries and keys raw, and their own embedding gives us the tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers import rotary_embedding as ropes
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tokenselect.rotary import RotaryTable

# Embeddings whose whole effect is a table of cosines and sines by position.
_TABLES = (
    ropes.RotaryEmbedding,
    ropes.LinearScalingRotaryEmbedding,
    ropes.DynamicNTKAlphaRotaryEmbedding,
    ropes.DynamicNTKScalingRotaryEmbedding,
    ropes.NTKScalingRotaryEmbedding,
    ropes.Llama3RotaryEmbedding,
    ropes.YaRNScalingRotaryEmbedding,
)


def is_selected() -> bool:
    """Whether the engine that is being built asks for our backend."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.attention_config.backend is AttentionBackendEnum.CUSTOM


class _Asked(dict[Any, nn.Module]):
    """vLLM's own store of embeddings; it also notes which one was asked for last."""

    last: nn.Module | None = None

    def __getitem__(self, key: Any) -> nn.Module:
        self.last = super().__getitem__(key)
        return self.last

    def __setitem__(self, key: Any, rope: nn.Module) -> None:
        self.last = rope
        super().__setitem__(key, rope)


def install() -> None:
    """Let embeddings that are built for our backend rotate nothing."""
    if isinstance(ropes._ROPE_DICT, _Asked):
        return
    ropes._ROPE_DICT = _Asked(ropes._ROPE_DICT)
    dispatch, forward = RotaryEmbeddingBase.dispatch_forward, Phi3LongRoPEScaledRotaryEmbedding.forward

    def dispatch_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _leave_raw if is_selected() else dispatch(self, *args, **kwargs)

    def forward_long(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None, *args: Any) -> Any:
        is_ours = getattr(self, "tokenselect_takes_over", False)
        return (query, key) if is_ours else forward(self, positions, query, key, *args)

    RotaryEmbeddingBase.dispatch_forward = dispatch_forward
    Phi3LongRoPEScaledRotaryEmbedding.forward = forward_long


def _leave_raw(positions: Tensor, query: Tensor, key: Tensor | None = None, *args: Any) -> tuple[Tensor, Tensor | None]:
    return query, key


def take_rope() -> nn.Module:
    """The embedding of the attention layer that is being built: the one that it asked for just before.

    Raises:
        NotImplementedError: it asked for none, or for one that is more than a table.
    """
    asked: Any = ropes._ROPE_DICT
    rope: nn.Module | None = asked.last
    asked.last = None
    if rope is None:
        raise NotImplementedError("TokenSelect: an attention layer without rotary embedding (NoPE) is not supported")
    if type(rope) is Phi3LongRoPEScaledRotaryEmbedding:
        rope.tokenselect_takes_over = True  # type: ignore[assignment]
    elif type(rope) not in _TABLES:
        raise NotImplementedError(f"TokenSelect: {type(rope).__name__} is not supported")
    return rope


@torch.no_grad()
def table_of(rope: Any, length: int, device: torch.device) -> RotaryTable:
    """The embedding's table in float32.

    Args:
        rope: what `take_rope` gave.
        length: positions needed.
        device: where the table shall lie.

    Raises:
        ValueError: the embedding has fewer positions.
    """
    whole = _cos_sin(rope, length).float()
    if whole.shape[0] < length:
        raise ValueError(
            f"TokenSelect needs {length} positions but the model's rotary embedding has {whole.shape[0]}: lower "
            "num_selected_tokens, num_local_tokens or num_dense_tokens"
        )
    cos, sin = whole[:length].chunk(2, dim=-1)
    factor = float(cos[0].mean())  # cos(0) = 1, so what is left is the attention factor
    cos, sin = ((part / factor).contiguous().to(device) for part in (cos, sin))
    return RotaryTable(cos, sin, not getattr(rope, "is_neox_style", True), factor)


def _cos_sin(rope: Any, length: int) -> Tensor:
    """[positions, rotary_dim], computed anew: the model's own copy is rounded to its dtype."""
    if type(rope) is not Phi3LongRoPEScaledRotaryEmbedding:
        table: Tensor = rope._compute_cos_sin_cache()
        return table
    # What is attended decides, not what is cached: no query sees more positions than `length`.
    if length <= rope.original_max_position_embeddings:
        positions, factors, mscale = rope.original_max_position_embeddings, rope.short_factor, rope.short_mscale
    else:
        positions, factors, mscale = rope.max_position_embeddings, rope.long_factor, rope.long_mscale
    long: Tensor = rope._compute_cos_sin_cache(positions, factors, mscale)
    return long
