"""What the plugin does not serve is refused at start, in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV2Config, MistralConfig
from vllm.engine.arg_utils import EngineArgs

from tests.vllm.engines import OURS, SETTINGS, WINDOW, engine
from tokenselect.integrations.vllm import refusals, settings

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": WINDOW,
}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


def _refusal(folder: Path, **kwargs: Any) -> str:
    """Why an engine with these arguments is refused; it is not built."""
    given = {"dtype": "bfloat16", "max_model_len": WINDOW, "skip_tokenizer_init": True, **OURS, **kwargs}
    given.setdefault("additional_config", {"tokenselect": SETTINGS})
    config = EngineArgs(str(folder), **given).create_engine_config()
    with pytest.raises((NotImplementedError, ValueError)) as caught:
        refusals.check(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"speculative_config": DRAFTS}, "speculative decoding is not supported"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache in fp8 is not supported: leave out --kv-cache-dtype"),
        ({"max_num_batched_tokens": 40, "max_num_seqs": 16}, "--max-num-batched-tokens must be at least block_size"),
    ],
    ids=["speculative decoding", "fp8 KV cache", "budget below a block"],
)
def test_engines_that_could_not_select_are_refused(model: Path, given: dict[str, Any], reason: str) -> None:
    assert _refusal(model, **given).startswith(f"TokenSelect: {reason}")


def test_a_cache_in_another_dtype_is_refused(model: Path) -> None:
    """From 0.33 on vLLM refuses it itself."""
    try:
        said = _refusal(model, kv_cache_dtype="float16")
    except ValueError as error:
        said = str(error)
    ours = "TokenSelect: a KV cache in float16 is not supported: leave out --kv-cache-dtype"
    assert said.startswith(ours) or 'kv_cache_dtype="float16" is incompatible with dtype="bfloat16"' in said


def test_an_offloaded_cache_is_refused(model: Path) -> None:
    given = {"additional_config": {"tokenselect": {**SETTINGS, "score_dtype": "int8", "kv_offload": True}}}
    assert _refusal(model, **given).startswith("TokenSelect: kv_offload must be false, got true")


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("traces", "needs the tokenizer"),
        (7, "must be the name of a folder, got 7"),
        ("", "must be the name of a folder, got ''"),
        (__file__, f"must be the name of a folder, {__file__!r} is a file"),
    ],
)
def test_a_server_that_could_not_trace_is_refused(model: Path, folder: object, reason: str) -> None:
    given = {"additional_config": {"tokenselect": {**SETTINGS, "trace_folder": folder}}}
    assert _refusal(model, **given).startswith(f"trace_folder {reason}")


def test_traces_must_be_allowed() -> None:
    assert not settings.wants_trace(None, {})
    assert not settings.wants_trace(None, {"tokenselect_trace": 0})
    assert settings.wants_trace(Path("traces"), {"tokenselect_trace": 1.0})
    with pytest.raises(ValueError, match="tokenselect_trace is not allowed: this server was started without"):
        settings.wants_trace(None, {"tokenselect_trace": 1})
    with pytest.raises(ValueError, match="tokenselect_trace must be 0 or 1, got 'yes'"):
        settings.wants_trace(Path("traces"), {"tokenselect_trace": "yes"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sliding_window": 4096}, "sliding-window attention"),
        ({"attn_type": "encoder"}, "only decoders"),
        ({"shared_with": "model.layers.0"}, "layers that share keys and values"),
    ],
    ids=["ALiBi", "sliding window", "encoder", "shared"],
)
def test_layers_of_another_kind_are_refused(changes: dict[str, Any], reason: str) -> None:
    plain = {"alibi_slopes": None, "sliding_window": None, "attn_type": "decoder", "shared_with": None}
    refusals.check_layer(**plain)
    with pytest.raises(NotImplementedError, match=f"TokenSelect: {reason}"):
        refusals.check_layer(**{**plain, **changes})


def test_an_engine_asks_before_it_reads_weights(tmp_path: Path) -> None:
    latent, sliding = tmp_path / "latent", tmp_path / "sliding"  # folders without weights
    DeepseekV2Config(**SHAPE, **LATENT, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(latent)
    MistralConfig(**SHAPE, sliding_window=128, architectures=["MistralForCausalLM"]).save_pretrained(sliding)
    for folder, reason in [(latent, "latent attention"), (sliding, "sliding-window attention")]:
        with (
            pytest.raises(NotImplementedError, match=f"TokenSelect: .*{reason}.* is not supported"),
            engine(folder, SETTINGS),
        ):
            pass


def test_a_port_that_cannot_be_is_refused() -> None:
    command = [Path(sys.executable).with_name("tokenselect"), "serve", "--port", "99999"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "Error: --port must be between 0 and 65535, got 99999" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
