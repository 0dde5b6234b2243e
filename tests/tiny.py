"""A tiny model on disk, and a text that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

CHAT = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'w1' or 'w3' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)
LONG = " ".join(f"w{i * i % 64}" for i in range(120))


def save_tiny(folder: Path, chat: str | None = CHAT, num_attention_heads: int = 4) -> Path:
    """A random Llama with a vocabulary of 64 words that never ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder
