"""Decode steps as CUDA graphs: the same tokens as without, whatever happens to the cache and the weights."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import NARROW, SIZES, SLIDING, build
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from tokenselect.integrations.captured import Captured
from tokenselect.integrations.passes import Pass
from tokenselect.integrations.steady import SteadyPass
from tokenselect.integrations.steps import Steps
from tokenselect.integrations.transformers import TokenSelect

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIGS = {
    "selecting": NARROW,
    "bf16 keys": NARROW.replace(score_dtype="same"),
    "one distance": NARROW.replace(scoring="position_free"),
    "by distance": NARROW.replace(scoring="distance"),
    "block in window": NARROW.replace(local_includes_block=True),
    "caching": NARROW.replace(reuse_threshold=0.5),
    "whole at first": NARROW.replace(num_dense_tokens=70),
    "covered": NARROW.replace(num_selected_tokens=180),
    "offloaded": NARROW.replace(kv_offload=True),
    "caching, offloaded": NARROW.replace(reuse_threshold=0.5, kv_offload=True),
}
STEADY = [name for name in CONFIGS if name != "covered"]


def on_gpu(config: Any) -> PreTrainedModel:
    return build(config).cuda()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return on_gpu(LlamaConfig(**SIZES))


def prompt(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.stack([torch.randperm(510, generator=generator)[:length] + 2 for _ in range(batch)]).cuda()


@torch.no_grad()
def written(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, steps: int) -> Tensor:
    """Logits [steps, batch, vocabulary] of tokens that follow, given the same ones whatever the logits say."""
    out = [model(ids, past_key_values=cache).logits[:, -1]]
    given = torch.arange(3, 3 + steps, device="cuda").expand(ids.shape[0], -1)
    out += [model(given[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(steps)]
    return torch.stack(out)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often graphs were replayed, and of how many steps the plan was a steady one."""
    counts = {"graphs": 0, "steady": 0}
    replay, layer = torch.cuda.CUDAGraph.replay, SteadyPass.layer

    def counted_replay(self: Any) -> None:
        counts["graphs"] += 1
        replay(self)

    def counted_layer(self: Any, own: Any) -> Any:
        counts["steady"] += 1
        return layer(self, own)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted_replay)
    monkeypatch.setattr(SteadyPass, "layer", counted_layer)
    return counts


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graphs, and every step planned as ever."""
    monkeypatch.setattr(Steps, "_capture", lambda self, index, form, bound: bound)
    monkeypatch.setattr(Captured, "__call__", None)
    from tokenselect.integrations.steady import SteadySteps

    monkeypatch.setattr(SteadySteps, "begin", lambda *args: None)


def check(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 2])
def test_same_logits(
    model: PreTrainedModel, name: str, batch: int, seen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TokenSelect(model, CONFIGS[name]):
        made = written(model, DynamicCache(), prompt(60, batch), 20)
    steady = name in STEADY
    assert (seen["steady"] > 0) == steady
    assert seen["graphs"] >= (2 * 2 if steady else 2 * 2 * 15)
    plainly(monkeypatch)
    with TokenSelect(model, CONFIGS[name]):
        check(made, written(model, DynamicCache(), prompt(60, batch), 20))


@pytest.mark.parametrize("name", ["selecting", "caching"])
def test_many_steps_through_growth_and_a_second_cache(
    model: PreTrainedModel, name: str, seen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[Tensor]:
        with TokenSelect(model, CONFIGS[name]):
            first, second = DynamicCache(), DynamicCache()
            out = [written(model, first, prompt(200), 70)]
            out.append(written(model, second, prompt(90), 5))
            out.append(written(model, first, prompt(1), 3))
            first.crop(-40)
            out.append(written(model, first, prompt(1), 9))
            out.append(written(model, second, prompt(30), 5))
            return out

    made = run()
    assert seen["steady"] > 100
    plainly(monkeypatch)
    for ours, expected in zip(made, run(), strict=True):
        check(ours, expected)


def test_a_padded_batch(model: PreTrainedModel, seen: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(90, 3)
    mask = torch.ones_like(ids)
    mask[1, :25], mask[2, :7] = 0, 0

    def run() -> list[list[int]]:
        with TokenSelect(model, NARROW):
            return model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False).tolist()

    made = run()
    assert seen["steady"] > 20
    plainly(monkeypatch)
    assert run() == made


@pytest.mark.parametrize("name", ["selecting", "block in window", "whole at first"])
def test_rows_written_by_one_launch_are_those_of_the_positions(
    model: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(230, 2)
    with TokenSelect(model, CONFIGS[name]), torch.no_grad():
        cache, other = DynamicCache(), DynamicCache()
        made = model(ids, past_key_values=cache).logits
        monkeypatch.setattr(Pass, "_is_plain", lambda self: False)
        expected = model(ids, past_key_values=other).logits
    check(made, expected)
    counts = [[(s.attended, s.available) for s in each.layers[0].states] for each in (cache, other)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["selecting", "caching"])
def test_a_cache_that_is_dropped_is_freed(model: PreTrainedModel, name: str) -> None:
    with TokenSelect(model, CONFIGS[name]):
        cache = DynamicCache()
        written(model, cache, prompt(60), 6)
        kept = weakref.ref(cache.layers[0])
        del cache
        gc.collect()
        assert kept() is None


def test_sliding_layers_beside_it(seen: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = on_gpu(Gemma3TextConfig(**SIZES, **SLIDING))
    with TokenSelect(gemma, NARROW):
        made = written(gemma, DynamicCache(config=gemma.config), prompt(60), 20)
    plainly(monkeypatch)
    with TokenSelect(gemma, NARROW):
        check(made, written(gemma, DynamicCache(config=gemma.config), prompt(60), 20))


@pytest.mark.parametrize("name", ["selecting", "caching"])
def test_beams_and_counts(model: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[int], list[int]]:
        cache = DynamicCache()
        with TokenSelect(model, CONFIGS[name]):
            ids = prompt(60)
            model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
            beams = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
            state = cache.layers[0].states[0]
            return beams[0].tolist(), [state.attended, state.available, state.lookups, state.hits]

    made = run()
    plainly(monkeypatch)
    assert run() == made


def test_weights_that_change_between_prompts_are_seen(model: PreTrainedModel) -> None:
    other = on_gpu(LlamaConfig(**SIZES))
    with TokenSelect(other, NARROW):
        before = written(other, DynamicCache(), prompt(60), 6)
        other.model.layers[0].mlp.down_proj.weight.data = other.model.layers[0].mlp.down_proj.weight.data * 1.5
        after = written(other, DynamicCache(), prompt(60), 6)
        assert not torch.allclose(before, after, atol=1e-3)
    with TokenSelect(other, NARROW):
        check(after, written(other, DynamicCache(), prompt(60), 6))


def test_hooks_run(model: PreTrainedModel) -> None:
    calls: list[int] = []
    with TokenSelect(model, NARROW):
        cache = DynamicCache()
        written(model, cache, prompt(60), 6)
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
        with hook:
            written(model, cache, prompt(1), 4)
        written(model, cache, prompt(1), 4)
    assert len(calls) == 5


def test_hidden_states_stay_what_they_were() -> None:
    model = on_gpu(LlamaConfig(**SIZES))  # Transformers leaves hooks in a model that was asked for them
    with TokenSelect(model, NARROW), torch.no_grad():
        cache = DynamicCache()
        written(model, cache, prompt(60), 6)
        outs = [model(prompt(1), past_key_values=cache, output_hidden_states=True).hidden_states for _ in range(3)]
        kept = [[part.clone() for part in out] for out in outs]
        written(model, cache, prompt(1), 3)
    for out, copies in zip(outs, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out, copies, strict=True))


def test_two_threads(model: PreTrainedModel) -> None:
    results: dict[int, Tensor] = {}
    with TokenSelect(model, NARROW):
        expected = {n: written(model, DynamicCache(), prompt(n), 20) for n in (60, 80)}

        def run(length: int) -> None:
            results[length] = written(model, DynamicCache(), prompt(length), 20)

        threads = [threading.Thread(target=run, args=(n,)) for n in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for length, logits in expected.items():
        check(results[length], logits)


@pytest.mark.parametrize("name", ["selecting", "caching"])
def test_no_step_waits_for_the_device(model: PreTrainedModel, name: str) -> None:
    with TokenSelect(model, CONFIGS[name]), torch.no_grad():
        cache = DynamicCache()
        written(model, cache, prompt(60), 6)
        token = prompt(1)
        for _ in range(3):
            model(token, past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(token, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
