"""What the plugin does not serve, each refused at start in one sentence."""

from __future__ import annotations

from typing import Any

from tokenselect.integrations.vllm.settings import read_settings, trace_folder

# Every layer of these rotates its queries and keys and attends all earlier tokens.
MODEL_TYPES = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")

CACHE_DTYPES = ("auto", "float16", "bfloat16")  # and that of the model


def check(vllm_config: Any) -> None:
    """Refuse an engine that would not select as it should.

    Raises:
        NotImplementedError: it uses a feature that is not supported.
        ValueError: two of its settings do not go together.
    """
    for reason in _unsupported(vllm_config):
        raise NotImplementedError(f"TokenSelect: {reason}")
    config, scheduler = read_settings(vllm_config), vllm_config.scheduler_config
    trace_folder(vllm_config)
    if vllm_config.parallel_config.tensor_parallel_size > 1 and config.head_weights:
        raise ValueError("TokenSelect: head_weights cannot be used with tensor parallelism")
    if scheduler.max_num_batched_tokens < config.block_size + scheduler.max_num_seqs:
        raise ValueError(
            f"TokenSelect: --max-num-batched-tokens must be at least block_size + --max-num-seqs "
            f"({config.block_size + scheduler.max_num_seqs}), got {scheduler.max_num_batched_tokens}"
        )
    if 0 < scheduler.long_prefill_token_threshold < config.block_size:
        raise ValueError(
            f"TokenSelect: --long-prefill-token-threshold must be at least block_size ({config.block_size}), got "
            f"{scheduler.long_prefill_token_threshold}"
        )


def _unsupported(vllm_config: Any) -> list[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    kind, own = model.hf_text_config.model_type, str(model.dtype).removeprefix("torch.")
    reasons = {
        "multi-head latent attention (MLA) is not supported": model.use_mla,
        f"models of type {kind} are not supported; supported are {', '.join(MODEL_TYPES)}": kind not in MODEL_TYPES,
        f"a KV cache in {cache_dtype} is not supported: leave out --kv-cache-dtype": cache_dtype not in ("auto", own),
        "speculative decoding is not supported": vllm_config.speculative_config is not None,
        "decode context parallelism is not supported": parallel.decode_context_parallel_size > 1,
        "KV transfer between servers is not supported": vllm_config.kv_transfer_config is not None,
        "set VLLM_USE_V2_MODEL_RUNNER=0: vLLM's second model runner is not supported": vllm_config.use_v2_model_runner,
        "ubatching is not supported": parallel.enable_dbo,
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def check_layer(alibi_slopes: Any, sliding_window: int | None, attn_type: str, shared_with: str | None) -> None:
    """Refuse a layer whose attention is of another kind.

    Raises:
        NotImplementedError: it is; names why.
    """
    reasons = {
        "ALiBi is not supported": alibi_slopes is not None,
        "sliding-window attention is not supported": sliding_window is not None,
        "only decoders are supported": attn_type != "decoder",
        "layers that share keys and values are not supported": shared_with is not None,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise NotImplementedError(f"TokenSelect: {reason}")
