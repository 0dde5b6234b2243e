"""What users do with a model inside TokenSelect: every way to generate works, or is refused by name."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import NARROW, SIZES, SLIDING, build
from transformers import (
    DynamicCache,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    StaticCache,
)

from tokenselect.cache import RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.transformers import TokenSelect, disable, enable
from tokenselect.selection import SelectionState
from tokenselect.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

LOGITS = 1e-4  # float32
HALF = {torch.bfloat16: 0.03, torch.float16: 0.004}  # relative error of the logits
WIDE = TokenSelectConfig(
    num_sink_tokens=4, num_local_tokens=60, num_selected_tokens=128, block_size=16, num_dense_tokens=0
)
CONFIGS = {
    "covered": WIDE,
    "selecting": NARROW,
    "caching": NARROW.replace(reuse_threshold=0.5),
    "short-ones-whole": NARROW.replace(num_dense_tokens=40),
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return build(Gemma3TextConfig(**SIZES, **SLIDING))


@pytest.fixture(params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> TokenSelectConfig:
    return CONFIGS[request.param]


def prompt(length: int, batch: int = 1) -> Tensor:
    """Tokens that differ: equal ones tie in the first layer, and rounding would choose between them."""
    generator = torch.Generator().manual_seed(length)
    return torch.stack([torch.randperm(510, generator=generator)[:length] + 2 for _ in range(batch)])


def generate(model: PreTrainedModel, ids: Tensor, steps: int = 12, **kwargs: Any) -> Tensor:
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, **kwargs}
    return model.generate(ids, max_new_tokens=steps, **kwargs)[:, ids.shape[1] :]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


@pytest.mark.parametrize("batch", [1, 3])
def test_who_records_changes_nothing(model: PreTrainedModel, batch: int) -> None:
    """Selections that nobody asks for go straight into rows of the cache."""
    found = []
    for recorder in (None, Recorder(trained_window=256)):
        with TokenSelect(model, NARROW, recorder=recorder):
            if recorder is not None:
                recorder.begin(0)
            found.append((logits(model, prompt(180, batch)), generate(model, prompt(180, batch))))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(ids.shape[1] for ids in prompts)
    rows = [torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids in prompts]
    ids = torch.cat(rows)
    return ids, (ids != 0).long()


def forward_lengths(model: PreTrainedModel) -> tuple[list[int], Any]:
    """How many tokens each pass through the first layer sees, and a handle to stop listening."""
    seen: list[int] = []
    layer = model.get_decoder().layers[0]
    return seen, layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True
    )


# -- generate ------------------------------------------------------------------------------------------------


def test_sampling_with_a_seed_gives_the_models_own_tokens(model: PreTrainedModel) -> None:
    def sample() -> list[int]:
        torch.manual_seed(5)
        return generate(model, prompt(40), 24, do_sample=True, top_k=20, temperature=1.5)[0].tolist()

    own = sample()
    with TokenSelect(model, WIDE):
        assert sample() == own


def test_sampling_with_a_seed_repeats(model: PreTrainedModel) -> None:
    def sample() -> list[int]:
        torch.manual_seed(5)
        return generate(model, prompt(60), 12, do_sample=True)[0].tolist()

    with TokenSelect(model, NARROW):
        assert sample() == sample()


@pytest.mark.parametrize("returned", [1, 3])
def test_covered_beam_search_is_the_models_own(model: PreTrainedModel, returned: int) -> None:
    kwargs = {"num_beams": 3, "num_return_sequences": returned}
    own = generate(model, prompt(40), 24, **kwargs)
    with TokenSelect(model, WIDE):
        assert torch.equal(generate(model, prompt(40), 24, **kwargs), own)


def test_beam_search_of_a_padded_batch_is_the_models_own(model: PreTrainedModel) -> None:
    ids, mask = left_padded([prompt(30), prompt(17)])
    own = generate(model, ids, 16, attention_mask=mask, num_beams=3)
    with TokenSelect(model, WIDE):
        assert torch.equal(generate(model, ids, 16, attention_mask=mask, num_beams=3), own)


def test_beams_that_select_score_like_their_tokens_alone(llama: PreTrainedModel) -> None:
    ids = prompt(60)
    with TokenSelect(llama, NARROW):
        beams = llama.generate(
            ids,
            max_new_tokens=8,
            num_beams=3,
            do_sample=False,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
        cache, total = DynamicCache(), 0.0
        last = logits(llama, ids, past_key_values=cache)[0, -1]
        for token in beams.sequences[0, 60:]:
            total += float(last.log_softmax(-1)[token])
            last = logits(llama, token[None, None], past_key_values=cache)[0, -1]
    assert total == pytest.approx(float(beams.sequences_scores[0]), abs=1e-3)


def test_a_streamer_sees_prompt_and_tokens_in_order(model: PreTrainedModel, config: TokenSelectConfig) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer, ids = Streamer(), prompt(50)
    with TokenSelect(model, config):
        out = generate(model, ids, streamer=streamer)
    assert streamer.tokens == ids[0].tolist() + out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("lengths", [(50, 33, 7), (60, 59, 36), (41, 1)], ids=str)
def test_a_padded_batch_equals_each_prompt_alone(
    model: PreTrainedModel, config: TokenSelectConfig, lengths: tuple[int, ...]
) -> None:
    prompts = [prompt(length) for length in lengths]
    ids, mask = left_padded(prompts)
    with TokenSelect(model, config):
        alone = torch.cat([generate(model, one) for one in prompts])
        together = generate(model, ids, attention_mask=mask)
    assert together.tolist() == alone.tolist()


def test_a_padded_batch_read_in_chunks_equals_each_prompt_alone(llama: PreTrainedModel) -> None:
    prompts = [prompt(length) for length in (60, 44, 20)]  # 8 tokens a block: all end a block at the same place
    ids, mask = left_padded(prompts)
    with TokenSelect(llama, NARROW.replace(prefill_chunk_size=16)):
        alone = torch.cat([generate(llama, one) for one in prompts])
        together = generate(llama, ids, attention_mask=mask)
    assert together.tolist() == alone.tolist()


def test_a_finished_sequence_leaves_the_others_alone(llama: PreTrainedModel, config: TokenSelectConfig) -> None:
    first, second = prompt(50), prompt(49)
    ids, mask = left_padded([first, second])
    with TokenSelect(llama, config):
        own = generate(llama, second, 20)[0].tolist()
        stop = next(token for token in generate(llama, first, 20)[0, 3:].tolist() if token not in own)
        together = generate(llama, ids, 20, attention_mask=mask, eos_token_id=stop)
    assert together[0, -1] == 0
    assert together[1].tolist() == own


@pytest.mark.parametrize("size", [8, 16, 24, 64])
def test_prefill_chunk_size_of_whole_blocks_changes_nothing(
    model: PreTrainedModel, config: TokenSelectConfig, size: int
) -> None:
    if size % config.block_size:
        config = config.replace(block_size=8)
    with TokenSelect(model, config):
        whole = generate(model, prompt(61))
        assert torch.equal(generate(model, prompt(61), prefill_chunk_size=size), whole)


@pytest.mark.parametrize("length", [1, 23, 24, 25, 90, 200])
def test_own_chunks_change_nothing(model: PreTrainedModel, length: int) -> None:
    with TokenSelect(model, NARROW.replace(prefill_chunk_size=1024)):
        whole = logits(model, prompt(length))
    with TokenSelect(model, NARROW.replace(prefill_chunk_size=16)):
        torch.testing.assert_close(logits(model, prompt(length)), whole, atol=LOGITS, rtol=0)


@pytest.mark.parametrize(("size", "most"), [(1, 24), (16, 24), (23, 24), (40, 40), (47, 40)])
def test_no_pass_sees_more_than_a_chunk(llama: PreTrainedModel, size: int, most: int) -> None:
    seen, handle = forward_lengths(llama)
    with handle, TokenSelect(llama, NARROW.replace(prefill_chunk_size=size)):
        generate(llama, prompt(200), 3)
    assert sum(seen) == 202
    assert max(seen) == most


def test_progress_ends_at_the_prompts_length(llama: PreTrainedModel) -> None:
    calls: list[tuple[int, int]] = []
    with TokenSelect(llama, NARROW.replace(prefill_chunk_size=32), on_prefill=lambda *done: calls.append(done)):
        generate(llama, prompt(100), 3)
    assert [total for _, total in calls] == [100] * len(calls)
    assert [done for done, _ in calls] == [32, 64, 96, 100]


def test_without_a_cache_the_tokens_are_the_same(model: PreTrainedModel) -> None:
    own = generate(model, prompt(40))
    with TokenSelect(model, WIDE):
        assert torch.equal(generate(model, prompt(40), use_cache=False), own)


def test_input_embeddings_work_like_tokens(model: PreTrainedModel, config: TokenSelectConfig) -> None:
    ids = prompt(50)
    with TokenSelect(model, config), torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        own = generate(model, ids)
        out = model.generate(
            inputs_embeds=embedded, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    assert torch.equal(out, own)


# -- turns and caches ----------------------------------------------------------------------------------------


def test_a_covered_second_turn_equals_one_long_prompt(model: PreTrainedModel) -> None:
    first, more = prompt(30), prompt(21)
    with TokenSelect(model, WIDE):
        cache = DynamicCache(config=model.config)
        answer = generate(model, first, past_key_values=cache)
        long = torch.cat((first, answer, more), dim=1)
        second = generate(model, long, past_key_values=cache)
    assert torch.equal(second, generate(model, long))


def test_a_selecting_second_turn_equals_one_call_each_token(llama: PreTrainedModel) -> None:
    config = NARROW.replace(num_tail_tokens=200)  # every token selects for itself, however it is fed
    ids = prompt(70)
    with TokenSelect(llama, config):
        whole = logits(llama, ids)
        cache = DynamicCache()
        parts = [logits(llama, part, past_key_values=cache) for part in ids.split([37, 1, 1, 20, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=LOGITS, rtol=0)


def test_tokens_taken_back_are_forgotten(llama: PreTrainedModel, config: TokenSelectConfig) -> None:
    ids, other = prompt(64), prompt(9)
    with TokenSelect(llama, config):
        cache, plain = DynamicCache(), DynamicCache()
        logits(llama, ids, past_key_values=cache)
        for token in other.split(1, dim=1):
            logits(llama, token, past_key_values=cache)
        cache.crop(-9)
        logits(llama, ids, past_key_values=plain)
        ours = logits(llama, other[:, :1], past_key_values=cache)
        torch.testing.assert_close(ours, logits(llama, other[:, :1], past_key_values=plain), atol=LOGITS, rtol=0)


def test_decoding_copies_no_cache(llama: PreTrainedModel, config: TokenSelectConfig) -> None:
    cache = DynamicCache()
    with TokenSelect(llama, config):
        logits(llama, prompt(60), past_key_values=cache)
        logits(llama, prompt(1), past_key_values=cache)

        def places() -> list[int]:
            layers = [layer for layer in cache.layers if isinstance(layer, RawKeyLayer)]
            buffers = [(layer.keys, layer.values) for layer in layers]
            return [part.data_ptr() for parts in buffers for part in parts]

        before, moves = places(), 0
        for _ in range(8):
            logits(llama, prompt(1), past_key_values=cache)
            moves += places() != before
            before = places()
    assert moves <= 1


def test_a_cache_filled_without_tokenselect_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, prompt(5), past_key_values=cache)
    with TokenSelect(model, NARROW), pytest.raises(ValueError, match="filled without TokenSelect"):
        logits(model, prompt(1), past_key_values=cache)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_cache_filled_inside_is_refused_after_leaving(model: PreTrainedModel, call: str) -> None:
    cache = DynamicCache(config=model.config)
    with TokenSelect(model, NARROW):
        logits(model, prompt(5), past_key_values=cache)
    use, ids = {"forward": (logits, prompt(1)), "generate": (generate, prompt(9))}[call]
    with pytest.raises(RuntimeError, match="holds raw keys"):
        use(model, ids, past_key_values=cache)


def test_a_cache_of_other_settings_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with TokenSelect(model, NARROW):
        logits(model, prompt(5), past_key_values=cache)
    with TokenSelect(model, WIDE), pytest.raises(ValueError, match="other settings"):
        logits(model, prompt(1), past_key_values=cache)


def test_a_reset_cache_starts_afresh(llama: PreTrainedModel, config: TokenSelectConfig) -> None:
    cache = DynamicCache()
    with TokenSelect(llama, config):
        logits(llama, prompt(60), past_key_values=cache)
        cache.reset()
        again = logits(llama, prompt(50), past_key_values=cache)
        assert torch.equal(again, logits(llama, prompt(50)))


# -- direct calls --------------------------------------------------------------------------------------------


def test_calls_with_and_without_a_cache_agree(model: PreTrainedModel, config: TokenSelectConfig) -> None:
    with TokenSelect(model, config), torch.no_grad():
        cached, plain = model(prompt(60)), model(prompt(60), use_cache=False)
    assert torch.equal(cached.logits, plain.logits)
    assert cached.past_key_values.get_seq_length() == 60
    assert plain.past_key_values is None


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("part", ["decoder", "model"])
def test_tuples_have_the_models_own_shape(model: PreTrainedModel, part: str, use_cache: bool) -> None:
    called = model if part == "model" else model.get_decoder()
    with torch.no_grad():
        own = called(prompt(30), return_dict=False, use_cache=use_cache)
        with TokenSelect(model, WIDE):
            ours = called(prompt(30), return_dict=False, use_cache=use_cache)
    assert [type(item) for item in ours] == [type(item) for item in own]
    torch.testing.assert_close(ours[0], own[0], atol=LOGITS, rtol=0)


def test_hidden_states_are_joined_over_chunks(model: PreTrainedModel) -> None:
    narrow = NARROW.replace(prefill_chunk_size=16)
    with TokenSelect(model, narrow), torch.no_grad():
        chunked = model(prompt(90), output_hidden_states=True)
    with TokenSelect(model, NARROW), torch.no_grad():
        whole = model(prompt(90), output_hidden_states=True)
    assert len(chunked.hidden_states) == 3
    for ours, expected in zip(chunked.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(ours, expected, atol=LOGITS, rtol=0)


def test_router_logits_are_joined_over_chunks() -> None:
    mixtral = build(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    with torch.no_grad():
        own = mixtral.model(prompt(90), output_router_logits=True).router_logits
        with TokenSelect(mixtral, NARROW.replace(prefill_chunk_size=16)):
            ours = mixtral.model(prompt(90), output_router_logits=True).router_logits
    assert [part.shape for part in ours] == [part.shape for part in own]


def test_logits_to_keep_works(llama: PreTrainedModel, config: TokenSelectConfig) -> None:
    with TokenSelect(llama, config):
        last, all_of_them = logits(llama, prompt(60), logits_to_keep=1), logits(llama, prompt(60))
    torch.testing.assert_close(last, all_of_them[:, -1:], atol=LOGITS, rtol=0)


def test_equal_rows_of_a_batch_agree(model: PreTrainedModel, config: TokenSelectConfig) -> None:
    with TokenSelect(model, config):
        three = logits(model, prompt(60).repeat(3, 1))
        one = logits(model, prompt(60))
    torch.testing.assert_close(three, one.expand_as(three), atol=LOGITS, rtol=0)


def test_positional_arguments_are_understood(llama: PreTrainedModel) -> None:
    ids, mask = left_padded([prompt(30), prompt(20)])
    with TokenSelect(llama, NARROW), torch.no_grad():
        by_name = llama.model(input_ids=ids, attention_mask=mask)[0]
        assert torch.equal(llama.model(ids, mask)[0], by_name)


def test_positional_arguments_of_another_order_are_understood() -> None:
    neox = build(GPTNeoXConfig(**SIZES))
    embedded = torch.randn(1, 30, 96)
    with torch.no_grad():
        own = neox.gpt_neox(None, None, None, embedded)[0]
        with TokenSelect(neox, WIDE):
            ours = neox.gpt_neox(None, None, None, embedded)[0]
    torch.testing.assert_close(ours, own, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_half_precision_is_the_models_own_too(dtype: torch.dtype, config: TokenSelectConfig) -> None:
    half = build(LlamaConfig(**SIZES)).to(dtype)
    own = logits(half, prompt(70))
    with TokenSelect(half, config):
        ours = logits(half, prompt(70))
    same = slice(None) if config is WIDE else slice(16)  # the first tokens need no selection
    error = (ours - own).float()[:, same].norm() / own.float()[:, same].norm()
    assert error < HALF[dtype]
    assert ours.isfinite().all()
    assert ours.dtype == dtype


def test_explicit_positions_of_a_padded_batch_are_accepted(model: PreTrainedModel, config: TokenSelectConfig) -> None:
    ids, mask = left_padded([prompt(50), prompt(20)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with TokenSelect(model, config):
        ours = logits(model, ids, attention_mask=mask, position_ids=positions)
        alone = logits(model, prompt(20))
    torch.testing.assert_close(ours[1:, 30:], alone, atol=LOGITS, rtol=0)


def test_no_input_gets_the_models_own_error(llama: PreTrainedModel) -> None:
    with TokenSelect(llama, NARROW), pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        llama()


# -- entering and leaving ------------------------------------------------------------------------------------


def test_enable_and_disable(llama: PreTrainedModel) -> None:
    own = logits(llama, prompt(60))
    enable(llama, NARROW)
    assert not torch.allclose(logits(llama, prompt(60)), own, atol=LOGITS)
    disable(llama)
    assert torch.equal(logits(llama, prompt(60)), own)


def test_disable_without_enable_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="not enabled"):
        disable(llama)


@pytest.mark.parametrize("inner", [lambda m: m, lambda m: m.model], ids=["model", "its-decoder"])
@pytest.mark.parametrize("outer", [lambda m: m, lambda m: m.model], ids=["model", "its-decoder"])
def test_nested_use_is_refused(
    llama: PreTrainedModel, outer: Callable[[Any], Any], inner: Callable[[Any], Any]
) -> None:
    own = logits(llama, prompt(40))
    with TokenSelect(outer(llama), NARROW):
        with pytest.raises(RuntimeError, match="already"), TokenSelect(inner(llama), NARROW):
            pass
        assert not torch.allclose(logits(llama, prompt(40)), own, atol=LOGITS)
    assert torch.equal(logits(llama, prompt(40)), own)


def test_one_object_can_be_entered_again(llama: PreTrainedModel) -> None:
    chosen = TokenSelect(llama, NARROW)
    with chosen:
        first = logits(llama, prompt(60))
    with chosen:
        assert torch.equal(logits(llama, prompt(60)), first)


def test_two_models_at_once_do_not_meet(llama: PreTrainedModel) -> None:
    other = build(LlamaConfig(**{**SIZES, "num_key_value_heads": 6}))
    own = logits(other, prompt(60))
    with TokenSelect(llama, NARROW):
        with TokenSelect(other, NARROW):
            both = logits(llama, prompt(60)), logits(other, prompt(60))
        assert torch.equal(logits(other, prompt(60)), own)
        assert torch.equal(logits(llama, prompt(60)), both[0])
    with TokenSelect(other, NARROW):
        assert torch.equal(logits(other, prompt(60)), both[1])


@pytest.mark.parametrize("first", ["llama", "other"])
def test_models_that_share_a_config_can_leave_in_any_order(llama: PreTrainedModel, first: str) -> None:
    other = build(llama.config)
    models = {"llama": llama, "other": other}
    own = {name: logits(model, prompt(60)) for name, model in models.items()}
    enable(llama, NARROW)
    enable(other, NARROW)
    disable(models.pop(first))
    disable(*models.values())
    assert torch.equal(logits(llama, prompt(60)), own["llama"])
    assert torch.equal(logits(other, prompt(60)), own["other"])
    assert llama.config._attn_implementation == "sdpa"


def test_a_dynamic_embedding_is_left_as_it_was() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = build(LlamaConfig(**{**SIZES, "max_position_embeddings": 64, "rope_parameters": scaling}))
    own = logits(model, prompt(100))
    with TokenSelect(model, NARROW):
        logits(model, prompt(200))
    assert torch.equal(logits(model, prompt(100)), own)


def test_an_enabled_model_can_be_freed() -> None:
    model = build(LlamaConfig(**SIZES))
    enable(model, NARROW)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_an_error_in_a_pass_leaves_the_model_usable(llama: PreTrainedModel) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with TokenSelect(llama, NARROW):
        own = logits(llama, prompt(60))
        handle = llama.model.layers[1].register_forward_pre_hook(fail)
        with handle, pytest.raises(KeyboardInterrupt):
            logits(llama, prompt(60))
        assert torch.equal(logits(llama, prompt(60)), own)


def test_a_budget_beyond_the_trained_window_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"1664 tokens.*256"):
        TokenSelect(llama, TokenSelectConfig())


# -- what is refused by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_generation_is_refused(llama: PreTrainedModel, kwargs: dict[str, Any], words: str) -> None:
    with TokenSelect(llama, NARROW), pytest.raises(NotImplementedError, match=words):
        llama.generate(prompt(40), max_new_tokens=2, **kwargs)


@pytest.fixture
def static_setting(llama: PreTrainedModel) -> Iterator[None]:
    llama.generation_config.cache_implementation = "static"
    yield
    llama.generation_config.cache_implementation = None


@pytest.mark.usefixtures("static_setting")
def test_the_models_own_generation_settings_are_checked_too(llama: PreTrainedModel) -> None:
    with TokenSelect(llama, NARROW), pytest.raises(NotImplementedError, match="cache_implementation"):
        llama.generate(prompt(40), max_new_tokens=2)


def test_a_static_cache_is_refused(llama: PreTrainedModel) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with TokenSelect(llama, NARROW), pytest.raises(NotImplementedError, match="StaticCache"):
        logits(llama, prompt(40), past_key_values=cache)


@pytest.mark.parametrize(
    "mask",
    [[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]],
    ids=lambda mask: "".join(map(str, mask)),
)
def test_other_than_left_padding_is_refused(model: PreTrainedModel, mask: list[int]) -> None:
    rows = torch.tensor([[1] * 5, mask])
    with TokenSelect(model, NARROW), pytest.raises(NotImplementedError, match="left padding"):
        logits(model, prompt(5, batch=2), attention_mask=rows)


def test_a_mask_of_another_length_is_refused(llama: PreTrainedModel) -> None:
    mask = torch.tensor([[0, 1, 1, 1]])
    with TokenSelect(llama, NARROW), pytest.raises(ValueError, match=r"5 tokens.*4"):
        logits(llama, prompt(5), attention_mask=mask)


def test_a_4d_mask_is_refused(model: PreTrainedModel) -> None:
    mask = torch.zeros(1, 1, 5, 5)
    with TokenSelect(model, NARROW), pytest.raises(NotImplementedError, match="2-D"):
        logits(model, prompt(5), attention_mask=mask)


def test_packed_sequences_are_refused(model: PreTrainedModel) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with TokenSelect(model, NARROW), pytest.raises(NotImplementedError, match="packed"):
        logits(model, prompt(5), position_ids=positions)


def test_training_is_refused() -> None:
    model = build(LlamaConfig(**SIZES)).train()
    with TokenSelect(model, NARROW), pytest.raises(NotImplementedError, match="training"):
        model(prompt(5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_matrices_are_refused(attention: str) -> None:
    model = build(LlamaConfig(**SIZES), attention)
    with TokenSelect(model, NARROW), pytest.raises(NotImplementedError, match="output_attentions"):
        model(prompt(5), output_attentions=True)


# -- contexts attended whole -----------------------------------------------------------------------------------


def test_a_short_enough_context_is_attended_whole(llama: PreTrainedModel) -> None:
    ids = torch.arange(2, 62)[None]
    config = NARROW.replace(num_dense_tokens=60)
    assert ids.shape[1] > config.budget
    dense = llama(ids).logits
    with TokenSelect(llama, config):
        torch.testing.assert_close(llama(ids).logits, dense, atol=1e-4, rtol=1e-4)
    with TokenSelect(llama, config.replace(num_dense_tokens=59)):
        assert not torch.allclose(llama(ids).logits, dense, atol=1e-4, rtol=1e-4)


def test_a_context_is_attended_whole_up_to_the_trained_window(llama: PreTrainedModel) -> None:
    ids = torch.arange(2, 302)[None]
    dense = llama(ids[:, :256]).logits
    with TokenSelect(llama, NARROW.replace(num_dense_tokens=8192)) as inside:
        assert inside.config.num_dense_tokens == 256
        torch.testing.assert_close(llama(ids[:, :256]).logits, dense, atol=1e-4, rtol=1e-4)
        for length, selects in ((256, False), (257, True)):
            cache = llama(ids[:, :length]).past_key_values
            assert [bool(state.available) for state in states_of(cache)] == [selects, selects]


@pytest.mark.parametrize(("setting", "limit"), [(64, 64), (8192, 256)], ids=["a-set-length", "the-window"])
def test_generation_selects_once_it_outgrows_what_is_attended_whole(
    llama: PreTrainedModel, setting: int, limit: int
) -> None:
    length = limit - 4
    ids = torch.arange(2, 2 + length)[None]
    own = llama.generate(ids, max_new_tokens=4, do_sample=False)
    with TokenSelect(llama, NARROW.replace(num_dense_tokens=setting)):
        output = llama.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, :limit], own)
    assert [state.available for state in states_of(output.past_key_values)] == [sum(range(limit + 1, length + 12))] * 2


def test_a_second_turn_selects_if_it_outgrows_what_is_attended_whole(llama: PreTrainedModel) -> None:
    ids = torch.arange(2, 82)[None]
    with TokenSelect(llama, NARROW.replace(num_dense_tokens=64)):
        first = llama.generate(ids[:, :40], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = first.past_key_values
        assert not any(state.available for state in states_of(cache))
        both = torch.cat((first.sequences, ids[:, 44:]), dim=1)
        llama.generate(both, past_key_values=cache, max_new_tokens=4, do_sample=False)
    read = first.sequences.shape[1] - 1  # the last token of an answer is not read
    blocks = [*range(read, 77), 80, 81, 82, 83]
    assert all(state.available >= sum(blocks[4:]) for state in states_of(cache))
    assert all(state.attended < state.available for state in states_of(cache))


def test_turns_within_what_is_attended_whole_are_the_models_own(llama: PreTrainedModel) -> None:
    ids = torch.arange(2, 62)[None]
    own = llama.generate(ids, max_new_tokens=4, do_sample=False)
    with TokenSelect(llama, NARROW.replace(num_dense_tokens=64)):
        cache = llama.generate(ids[:, :40], max_new_tokens=1, return_dict_in_generate=True).past_key_values
        assert torch.equal(llama.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), own)


def states_of(cache: Any) -> list[SelectionState]:
    return [state for layer in cache.layers for state in layer.states]
