"""Every method writes, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from scheme_case import logits_of, tiny_llama
from transformers import LlamaForCausalLM

from tokenselect.config import TokenSelectConfig
from tokenselect.methods import METHODS, attach, choice, method_config

SMALL = TokenSelectConfig(
    num_sink_tokens=16,
    num_local_tokens=64,
    num_selected_tokens=128,
    num_dense_tokens=0,
    block_size=64,
    num_tail_tokens=4,
    prefill_chunk_size=128,
)
DENSE = ("dense", "ntk", "yarn", "self_extend")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(4096)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_writes_and_leaves(model: LlamaForCausalLM, method: str) -> None:
    ids, told = torch.randint(64, (1, 600)), []
    before, names = logits_of(model, ids), set(vars(model.model.rotary_emb))
    with attach(model, method, SMALL, lambda done, total: told.append((done, total))):
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 604)
    assert told[-1] == (600, 600)
    assert torch.equal(logits_of(model, ids), before)
    assert set(vars(model.model.rotary_emb)) == names
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_after_an_error(model: LlamaForCausalLM, method: str) -> None:
    ids = torch.randint(64, (1, 20))
    before = logits_of(model, ids)
    with pytest.raises(ZeroDivisionError), attach(model, method, SMALL, print):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(DENSE)))
def test_a_budget_that_covers_the_context_is_dense_attention(model: LlamaForCausalLM, method: str) -> None:
    ids = torch.randint(64, (1, 300))
    dense, wide = logits_of(model, ids), SMALL.replace(num_selected_tokens=512, num_local_tokens=512)
    with attach(model, method, wide):
        torch.testing.assert_close(logits_of(model, ids, steps=2), dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(DENSE) - {"paper", "published"}))
def test_a_method_attends_no_more_than_its_budget(model: LlamaForCausalLM, method: str) -> None:
    from transformers import DynamicCache

    cache, settings = DynamicCache(config=model.config), method_config(method, SMALL)
    with attach(model, method, SMALL), torch.no_grad():
        model(torch.randint(64, (1, 900)), past_key_values=cache)
        states = [state for layer in cache.layers for state in layer.states]
        assert settings is not None
        assert settings.budget <= SMALL.budget + (settings.num_local_tokens + 1 - 64 if settings.reuse else 0)
        assert 0 < sum(state.attended for state in states) < sum(state.available for state in states)


def test_methods_differ(model: LlamaForCausalLM) -> None:
    ids = torch.randint(64, (1, 900))
    found = {}
    for method in ("tokenselect", "streaming", "streaming_same_window", "infllm", "quest", "snapkv", "dense"):
        with attach(model, method, SMALL):
            found[method] = logits_of(model, ids)
    for i, one in enumerate(found):
        for other in list(found)[i + 1 :]:
            assert not torch.allclose(found[one], found[other], atol=1e-3), (one, other)


def test_an_unknown_method_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"method must be one of tokenselect, streaming, dense, .*, got 'best'"):
        attach(model, "best", SMALL)
    with pytest.raises(ValueError, match="got 'best'"):
        method_config("best", SMALL)


def test_settings_of_methods() -> None:
    assert method_config("tokenselect", SMALL) is SMALL
    for method in DENSE:
        assert method_config(method, SMALL) is None
        assert choice(method) is None
    streaming, narrow = (method_config(name, SMALL) for name in ("streaming", "streaming_same_window"))
    assert streaming is not None
    assert narrow is not None
    assert (streaming.num_local_tokens, narrow.num_local_tokens) == (192, 64)
    assert streaming.num_selected_tokens == narrow.num_selected_tokens == 0
