"""A tiny model with a small window, and its logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


def tiny_llama(window: int, **settings: Any) -> LlamaForCausalLM:
    """A random Llama, the same for all settings of the rotary embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, ids: torch.Tensor, steps: int = 0) -> torch.Tensor:
    """Logits of all tokens, the last `steps` of which are read one by one."""
    cache, prompt = DynamicCache(config=model.config), ids.shape[1] - steps
    parts = [model(ids[:, :prompt], past_key_values=cache).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    return torch.cat(parts, dim=1)
