"""vLLM's engine in this process, over tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.vllm import SCHEDULER

WINDOW = 256
SETTINGS = {
    "num_sink_tokens": 4,
    "num_local_tokens": 16,
    "num_selected_tokens": 16,
    "num_dense_tokens": 64,
    "block_size": 32,
    "num_tail_tokens": 8,
}
CONFIG = TokenSelectConfig(**SETTINGS)
OURS: dict[str, Any] = {"attention_backend": "CUSTOM", "scheduler_cls": SCHEDULER}


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama whose greedy answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).save_pretrained(folder)
    return folder


@contextmanager
def engine(folder: Path, settings: dict[str, Any] | None, **kwargs: Any) -> Iterator[LLM]:
    """An engine in this process; `settings` None: stock vLLM."""
    given: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 20_480,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "kv_cache_memory_bytes": 160 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    ours = {**OURS, "additional_config": {"tokenselect": settings}} if settings is not None else {}
    llm = LLM(str(folder), **{**given, **ours, **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def greedy(tokens: int, **extra: Any) -> SamplingParams:
    """Greedy, to a fixed length."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra or None)


def answers(llm: LLM, prompts: list[list[int]], tokens: int = 8, **extra: Any) -> list[list[int]]:
    """What the engine writes after each prompt, all given at once."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, greedy(tokens, **extra), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt(length: int, seed: int, vocabulary: int = 512) -> list[int]:
    """Random tokens."""
    random = Random(seed)
    return [random.randrange(vocabulary) for _ in range(length)]
