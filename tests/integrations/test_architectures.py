"""Every architecture at random weights: a covered context gets the model's own attention.

Leaving undoes everything; what cannot be served is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import small
import torch
import transformers
from small import SLIDING
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.transformers import TokenSelect

LOGITS = 1e-4  # float32
WIDE = TokenSelectConfig(
    num_sink_tokens=4, num_local_tokens=60, num_selected_tokens=128, block_size=16, num_dense_tokens=0
)
NARROW = small.NARROW.replace(prefill_chunk_size=16)
SIZES = {**small.SIZES, "vocab_size": 96, "tie_word_embeddings": False}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}


def scaled(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **more}}


@dataclass(frozen=True)
class Case:
    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"

    def model(self) -> PreTrainedModel:
        torch.manual_seed(1)
        config = getattr(transformers, self.config)(**{**SIZES, **self.settings})
        return build(config, self.attention)


def build(config: Any, attention: str = "sdpa") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "sinks" in name or name.endswith("bias"):  # as if trained
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CASES = [
    Case("llama", "LlamaConfig"),
    Case("llama-eager", "LlamaConfig", attention="eager"),
    Case("llama-no-groups", "LlamaConfig", {"num_key_value_heads": 6, "attention_bias": True}),
    Case(
        "llama3.1",
        "LlamaConfig",
        scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    Case("llama-linear", "LlamaConfig", scaled("linear")),
    Case("llama-dynamic", "LlamaConfig", scaled("dynamic")),
    Case("llama-yarn", "LlamaConfig", scaled("yarn", original_max_position_embeddings=64)),
    Case(
        "yi",
        "LlamaConfig",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    ),
    Case("qwen2", "Qwen2Config"),
    Case(
        "qwen2-some-layers-slide",
        "Qwen2Config",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 12},
    ),
    Case("qwen3", "Qwen3Config"),
    Case("mistral", "MistralConfig", {"sliding_window": None}),
    Case("mixtral", "MixtralConfig", {"sliding_window": None, **MOE}),
    Case(
        "phi3",
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    Case(
        "phi3-longrope-short",
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 200},
    ),
    Case(
        "phi3-longrope-crossing",
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 60},
    ),
    Case(
        "phi3-longrope-long",
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
    ),
    Case("gpt-neox", "GPTNeoXConfig", {"rotary_pct": 0.25}),
    Case("gpt-neox-sequential", "GPTNeoXConfig", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    Case("starcoder2", "Starcoder2Config", {"sliding_window": None}),
    Case("olmo2", "Olmo2Config"),
    Case(
        "gemma2",
        "Gemma2Config",
        {**SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 20},
        "eager",
    ),
    Case("gemma2-no-cap", "Gemma2Config", {**SLIDING, "attn_logit_softcapping": None}, "eager"),
    Case("gemma3", "Gemma3TextConfig", SLIDING),
    Case("gemma3-eager", "Gemma3TextConfig", SLIDING, "eager"),
    Case("gpt-oss", "GptOssConfig", {**SLIDING, **MOE}, "eager"),
    Case("olmo3", "Olmo3Config", SLIDING),
    Case("ministral3", "Ministral3Config"),
    Case("cohere", "CohereConfig", {"logit_scale": 1.0}),
    Case("glm", "GlmConfig"),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param.model()


def prompt(length: int) -> torch.Tensor:
    return torch.randint(2, 96, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def greedy(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> list[int]:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)[0, ids.shape[1] :].tolist()


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """All that entering could have touched."""
    return {
        "names": sorted(AttentionInterface._global_mapping) + sorted(AttentionMaskInterface._global_mapping),
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "modules": [(name, id(m)) for name, m in model.named_modules()],
    }


def test_covered_context_has_the_models_own_logits(model: PreTrainedModel) -> None:
    ids = prompt(70)
    own = logits(model, ids)
    with TokenSelect(model, WIDE):
        ours = logits(model, ids)
    torch.testing.assert_close(ours, own, atol=LOGITS, rtol=0)


def test_covered_context_has_the_models_own_greedy_tokens(model: PreTrainedModel) -> None:
    ids = prompt(40)
    own = greedy(model, ids, 64)
    assert len(set(own)) > 5  # a model that repeats one token would prove nothing
    with TokenSelect(model, WIDE):
        assert greedy(model, ids, 64) == own


def test_choosing_every_token_has_the_models_own_logits(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NARROW.replace(block_size=96, num_tail_tokens=40)
    chosen = []

    def everything(queries: torch.Tensor, keys: torch.Tensor, pages: Any, plan: Any, *_: Any) -> list[torch.Tensor]:
        chosen.append(len(plan.blocks))
        return [torch.arange(block.end) for block in plan.blocks]

    monkeypatch.setattr("tokenselect.integrations.transformers.select_tokens", everything)
    ids = prompt(80)
    own = logits(model, ids)
    with TokenSelect(model, config):
        ours = logits(model, ids)
    assert chosen
    assert set(chosen) == {40}
    torch.testing.assert_close(ours, own, atol=LOGITS, rtol=0)


def test_selection_runs_and_is_undone(model: PreTrainedModel) -> None:
    ids = prompt(80)
    own, before = logits(model, ids), traces(model)
    with TokenSelect(model, NARROW):
        ours = logits(model, ids)
        assert len(greedy(model, ids, 4)) == 4
    assert ours.isfinite().all()
    assert (ours - own).abs().max() > 10 * LOGITS
    short = logits(model, ids[:, : NARROW.budget])[:, :16]  # nothing to choose from yet
    torch.testing.assert_close(ours[:, :16], short, atol=LOGITS, rtol=0)
    assert traces(model) == before
    assert torch.equal(logits(model, ids), own)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_exception_inside_is_undone(model: PreTrainedModel) -> None:
    ids = prompt(30)
    own, before = logits(model, ids), traces(model)
    handle = model.get_decoder().layers[1].register_forward_pre_hook(interrupt)
    with handle, pytest.raises(KeyboardInterrupt), TokenSelect(model, NARROW):
        logits(model, ids)
    assert traces(model) == before
    assert torch.equal(logits(model, ids), own)


def test_positions_beyond_the_trained_window_stay_finite_and_stable() -> None:
    model = CASES[0].model()
    ids = prompt(400)  # the window is 256
    with TokenSelect(model, NARROW):
        ours = logits(model, ids)
    assert ours.isfinite().all()


REFUSED = {
    "bloom": ("BloomConfig", {}, "ALiBi"),
    "mpt": ("MptConfig", {"d_model": 96, "n_heads": 6, "n_layers": 2}, "ALiBi"),
    "gpt2": ("GPT2Config", {"n_embd": 96, "n_head": 6, "n_layer": 2}, "rotary"),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 96, "ffn_dim": 64}, "rotary"),
    "deepseek-v2": ("DeepseekV2Config", {"kv_lora_rank": 8, "q_lora_rank": 8}, "MLA"),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        "MLA",
    ),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 32}, "sliding"),
    "cohere2-nope": ("Cohere2Config", SLIDING, "NoPE"),
    "smollm3-nope": ("SmolLM3Config", {"no_rope_layers": [1, 0], "use_sliding_window": False}, "NoPE"),
    "qwen3-next-linear": (
        "Qwen3NextConfig",
        {"layer_types": ["linear_attention", "full_attention"]},
        "linear_attention",
    ),
    "llama4-chunked": (
        "Llama4TextConfig",
        {"layer_types": ["chunked_attention", "full_attention"]},
        "chunked_attention",
    ),
    "llama4-full": (
        "Llama4TextConfig",
        {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]},
        "rotary",
    ),
    "diffllama-mixed-values": ("DiffLlamaConfig", {}, "diffllama"),
    "jetmoe-repeated-keys": ("JetMoeConfig", {**MOE, "kv_channels": 16, "num_key_value_heads": 3}, "jetmoe"),
    "gpt-neox-japanese": ("GPTNeoXJapaneseConfig", {}, "gpt_neox_japanese"),
    "hunyuan-norm-after-rope": ("HunYuanDenseV1Config", {}, "layout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_decoders_are_refused_by_name(name: str) -> None:
    kind, settings, words = REFUSED[name]
    config = getattr(transformers, kind)(**{**SIZES, **settings})
    model = build(config, "eager")
    before = traces(model)
    with pytest.raises(NotImplementedError, match=words), TokenSelect(model, NARROW):
        model(prompt(5))  # some show what they are only when they run
    assert traces(model) == before


ENCODERS = {
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4},
        "encoder-decoder",
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", {"d_model": 32}, "encoder-decoder"),
    "bert": ("BertConfig", "BertForMaskedLM", {"hidden_size": 48}, "rotary"),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {"hidden_size": 48, "local_attention": 8},
        "bidirectional",
    ),
    "eurobert": ("EuroBertConfig", "EuroBertForMaskedLM", {"hidden_size": 48}, "bidirectional"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_refused_by_name(name: str) -> None:
    kind, cls, settings, words = ENCODERS[name]
    sizes = {
        "vocab_size": 96,
        "pad_token_id": 0,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        **settings,
    }
    model = getattr(transformers, cls)(getattr(transformers, kind)(**sizes)).eval()
    with pytest.raises(NotImplementedError, match=words), TokenSelect(model, NARROW):
        pass
