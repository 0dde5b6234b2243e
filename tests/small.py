"""Models of a few thousand random weights with a window of 256, and settings under which their prompts select."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from tokenselect.config import TokenSelectConfig

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING: dict[str, Any] = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
# The first 24 tokens need no selection.
NARROW = TokenSelectConfig(
    num_sink_tokens=2,
    num_local_tokens=8,
    num_selected_tokens=8,
    block_size=8,
    num_tail_tokens=4,
    prefill_chunk_size=96,
    num_dense_tokens=0,
)


def build(config: Any, attention: str = "sdpa") -> PreTrainedModel:
    """The model of a Transformers config, the same weights each time."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
