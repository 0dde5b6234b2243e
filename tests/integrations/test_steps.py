"""Traced decode steps: the same tokens as the host's own Python, and its own Python where tracing would be wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from small import NARROW, SIZES, build
from test_generate import CONFIGS, LOGITS, generate, prompt
from transformers import DynamicCache, GemmaConfig, LlamaConfig, MixtralConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama import modeling_llama

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.steps import Steps, quicken_norms
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.ops import cpu

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDE_ROWS = {**SIZES, "hidden_size": 96, "intermediate_size": 64}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build(LlamaConfig(**WIDE_ROWS))


@pytest.fixture(scope="module")
def mixtral() -> PreTrainedModel:
    return build(MixtralConfig(**WIDE_ROWS, num_local_experts=4, num_experts_per_tok=2))


@torch.no_grad()
def steps_of(model: PreTrainedModel, config: TokenSelectConfig, batch: int = 1, count: int = 6) -> tuple[Tensor, Steps]:
    """Logits of some decode steps, and the programs that ran them."""
    with TokenSelect(model, config) as host:
        cache = DynamicCache(config=model.config)
        model(prompt(70, batch), past_key_values=cache)
        out = [model(torch.full((batch, 1), 5 + i), past_key_values=cache).logits for i in range(count)]
        return torch.cat(out, dim=1), host._steps


def programs(steps: Steps) -> list[Any]:
    return [program for program in steps._bound.values() if program is not None]


def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "find", lambda *args: None)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_same_logits_as_the_hosts_own_steps(
    llama: PreTrainedModel, config: TokenSelectConfig, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, steps = steps_of(llama, config, batch)
    assert len(programs(steps)) == 2  # one a layer
    assert len(steps._traced) == 1  # which share what was recorded
    untraced(monkeypatch)
    torch.testing.assert_close(traced, steps_of(llama, config, batch)[0], atol=LOGITS, rtol=0)


def test_same_tokens_on_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.models import load_model

    loaded = load_model(dtype="float32")
    ids = loaded.tokenizer("The sea was calm, and the captain said: " * 30, return_tensors="pt").input_ids
    config = TokenSelectConfig(num_sink_tokens=16, num_local_tokens=64, num_selected_tokens=64, num_dense_tokens=0)
    made = []
    for _ in range(2):
        with TokenSelect(loaded.model, config):
            made.append(generate(loaded.model, ids, 24))
        untraced(monkeypatch)
    assert torch.equal(*made)


def test_a_norm_and_a_linear_layer_are_one_call_each(llama: PreTrainedModel) -> None:
    if cpu.why_missing():
        pytest.skip(f"native kernels: {cpu.why_missing()}")
    (program,) = steps_of(llama, NARROW)[1]._traced.values()
    assert program is not None
    code = program.run.__self__.code
    assert code.count("rms_norm.default(") == 2
    assert code.count("linear3.default(") == 1  # queries, keys, values
    assert code.count("linear2.default(") == 1  # gate and up
    assert code.count("linear.default(") == 2
    assert "rsqrt" not in code
    assert "neg" not in code  # a rotation by nothing is left out


def test_norms_of_queries_and_keys_too() -> None:
    (program,) = steps_of(build(Qwen3Config(**WIDE_ROWS)), NARROW)[1]._traced.values()
    if cpu.why_missing() is None:
        assert program.run.__self__.code.count("rms_norm.default(") == 4


class OneLaunch:
    """A backend whose norm is one launch."""

    def __init__(self) -> None:
        self.launches = 0

    def takes_norm(self, weight: Tensor) -> bool:
        return True

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        self.launches += 1
        return torch.nn.functional.rms_norm(rows, weight.shape, weight, epsilon)


@pytest.mark.parametrize(("kind", "launches"), [(LlamaConfig, 5), (GemmaConfig, 0)], ids=["llama", "gemma"])
def test_norms_that_do_what_llamas_do_are_one_launch(kind: Any, launches: int) -> None:
    model, ops, ids = build(kind(**WIDE_ROWS)), OneLaunch(), prompt(9)
    with torch.no_grad():
        expected = model(ids).logits
        with ExitStack() as stack:
            quicken_norms(stack, model, ops)
            torch.testing.assert_close(model(ids).logits, expected, atol=LOGITS, rtol=0)
        assert ops.launches == launches
        assert torch.equal(model(ids).logits, expected)  # and it is undone
    assert ops.launches == launches


def test_norms_that_must_be_differentiated_are_left_alone(llama: PreTrainedModel) -> None:
    ops = OneLaunch()
    with ExitStack() as stack:
        quicken_norms(stack, llama, ops)
        llama(prompt(9)).logits.sum().backward()
    assert ops.launches == 0
    llama.zero_grad()


def test_the_plain_definition_traces_too(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NARROW.replace(backend="reference")
    traced, steps = steps_of(llama, config)
    assert len(programs(steps)) == 2
    untraced(monkeypatch)
    assert torch.equal(traced, steps_of(llama, config)[0])


def test_work_that_depends_on_values_is_not_recorded(mixtral: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of experts may be recorded only where its experts are chosen by tensors, not by Python."""
    traced, _ = steps_of(mixtral, NARROW, count=12)
    untraced(monkeypatch)
    torch.testing.assert_close(traced, steps_of(mixtral, NARROW, count=12)[0], atol=LOGITS, rtol=0)


@torch.no_grad()
def test_queries_are_not_rotated_by_nothing_and_other_models_as_ever(llama: PreTrainedModel) -> None:
    other, ids = build(LlamaConfig(**SIZES)), prompt(20)
    before, expected = modeling_llama.apply_rotary_pos_emb, other(ids).logits
    ones: list[bool] = []

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ones.append(bool((cos == 1).all()))
        return before(q, k, cos, sin)

    with patch.object(modeling_llama, "apply_rotary_pos_emb", rotate):
        with TokenSelect(llama, NARROW), TokenSelect(other, NARROW):
            ones.clear()  # it was tried out
            llama(prompt(20))
            assert not ones
        with TokenSelect(llama, NARROW):
            ones.clear()
            torch.testing.assert_close(other(ids).logits, expected, atol=0, rtol=0)
            assert ones == [False] * other.config.num_hidden_layers
        assert modeling_llama.apply_rotary_pos_emb is rotate


def test_hooks_inside_a_layer_still_run(llama: PreTrainedModel) -> None:
    seen: list[int] = []
    handle = llama.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    try:
        steps = steps_of(llama, NARROW, count=4)[1]
    finally:
        handle.remove()
    assert len(seen) >= 4
    assert len(programs(steps)) == 1


def test_hooks_that_come_later_run_too(llama: PreTrainedModel) -> None:
    cache, seen = DynamicCache(config=llama.config), []
    with TokenSelect(llama, NARROW), torch.no_grad():
        llama(prompt(50), past_key_values=cache)
        llama(torch.tensor([[5]]), past_key_values=cache)
        handle = llama.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
        llama(torch.tensor([[6]]), past_key_values=cache)
        handle.remove()
        llama(torch.tensor([[7]]), past_key_values=cache)
    assert seen == [1]


def test_a_method_that_a_user_has_replaced_is_that_layers_own(llama: PreTrainedModel) -> None:
    mlp, before = llama.model.layers[1].mlp, steps_of(llama, NARROW)[0]
    mlp.forward = lambda x: 0 * x
    try:
        without, steps = steps_of(llama, NARROW)
        assert mlp.forward(torch.ones(1)) == 0
    finally:
        del mlp.forward
    assert len(steps._traced) == 2
    assert (without - before).abs().max() > 1e-3


def test_embeddings_that_lie_apart_and_of_another_type(llama: PreTrainedModel) -> None:
    config = NARROW.replace(prefill_chunk_size=16)
    embeds = llama.model.embed_tokens(prompt(90, 2)).detach()
    with TokenSelect(llama, config), torch.no_grad():
        made = llama(inputs_embeds=embeds).logits
    assert made.shape[:2] == (2, 90)
    with TokenSelect(llama, config), torch.no_grad():
        torch.testing.assert_close(made, llama(prompt(90, 2)).logits, atol=LOGITS, rtol=0)


def test_a_head_outside_of_the_decoder_can_learn(llama: PreTrainedModel) -> None:
    llama.lm_head.weight.requires_grad_(True)
    with TokenSelect(llama, NARROW):
        llama(prompt(5)).logits.sum().backward()
    assert llama.lm_head.weight.grad is not None
    llama.zero_grad()


def test_values_of_other_arguments_are_not_baked_in() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return x * int(kwargs["position_ids"])

    steps, layer, x = Steps((torch.ones(1), torch.zeros(1)), cpu), Odd(), torch.ones(1, 1, 16)
    assert steps.find(0, layer, layer.forward, x, {"position_ids": torch.tensor([[7]])}) is None


def test_threads_with_models_of_their_own() -> None:
    models = [build(LlamaConfig(**WIDE_ROWS)) for _ in range(3)]
    expected = generate_with(models[0])
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(generate_with, models * 2))
    assert all(torch.equal(expected, other) for other in made)
    assert torch.nn.Module.__call__.__qualname__.startswith("Module.")


_BUSY = {}


def generate_with(model: PreTrainedModel) -> Tensor:
    with _BUSY.setdefault(id(model), Lock()), TokenSelect(model, NARROW):
        return generate(model, prompt(50), 8)


def test_hidden_states_can_be_asked_for(llama: PreTrainedModel) -> None:
    ids = prompt(40)
    with TokenSelect(llama, NARROW):
        made = llama.generate(
            ids, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
    assert [len(step) for step in made.hidden_states] == [3, 3, 3]


def test_changed_weights_count_from_the_next_prompt_on(llama: PreTrainedModel) -> None:
    module: nn.Linear = llama.model.layers[0].mlp.down_proj
    before = module.weight
    with TokenSelect(llama, NARROW):
        first = generate(llama, prompt(50), 8)
        module.weight = torch.nn.Parameter(-2 * before.detach())
        changed = generate(llama, prompt(50), 8)
        module.weight = before
        assert torch.equal(generate(llama, prompt(50), 8), first)
    assert not torch.equal(changed, first)


def test_in_place_changes_count_at_once(llama: PreTrainedModel) -> None:
    weight = llama.model.layers[0].mlp.down_proj.weight
    cache = DynamicCache(config=llama.config)
    with TokenSelect(llama, NARROW), torch.no_grad():
        llama(prompt(50), past_key_values=cache)
        token = torch.tensor([[5]])
        first = llama(token, past_key_values=cache).logits
        cache.crop(-1)
        weight.mul_(2)
        try:
            second = llama(token, past_key_values=cache).logits
        finally:
            weight.div_(2)
    assert (first - second).abs().max() > 1e-3


def test_autocast_runs_the_hosts_own_steps(llama: PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not programs(steps_of(llama, NARROW)[1])


def test_leaving_gives_linear_layers_back(llama: PreTrainedModel) -> None:
    with TokenSelect(llama, NARROW):
        pass
    assert all("forward" not in module.__dict__ for module in llama.modules())
