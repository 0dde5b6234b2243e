"""LLM: text in, streamed text and numbers out; several turns; the model is left as it was, come what may."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import LONG, save_tiny
from transformers import LlamaConfig

import tokenselect
from tokenselect import memory
from tokenselect.config import TokenSelectConfig
from tokenselect.llm import LLM
from tokenselect.methods import attach, method_config
from tokenselect.models import LoadedModel, load_model
from tokenselect.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

METHODS = ("tokenselect", "streaming", "dense")
SMALL = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=16,
    num_selected_tokens=16,
    block_size=16,
    num_tail_tokens=4,
    prefill_chunk_size=16,
    num_dense_tokens=0,
)
WIDE = SMALL.replace(num_selected_tokens=200)  # covers every context of these tests


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(params=METHODS)
def llm(request: pytest.FixtureRequest, loaded: LoadedModel) -> LLM:
    return LLM(loaded, request.param, SMALL)


@pytest.fixture(autouse=True)
def model_is_left_alone(loaded: LoadedModel) -> Iterator[None]:
    yield
    model = loaded.model
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)
    assert "forward" not in vars(model.model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def interrupts() -> Iterator[Any]:
    """Send Ctrl-C to the main thread, also where a shell started us with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


# ---- importing


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, tokenselect, tokenselect.cli; tokenselect.TokenSelectConfig().budget; dir(tokenselect)\n"
    code += "print({'torch', 'transformers', 'triton', 'vllm', 'matplotlib'} & set(sys.modules))"
    source = str(Path(tokenselect.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_public_names() -> None:
    for name in tokenselect.__all__:
        assert getattr(tokenselect, name) is not None
        assert name in dir(tokenselect)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tokenselect.no_such_name


# ---- one answer


def test_pieces_join_to_the_text_of_the_plain_model(loaded: LoadedModel) -> None:
    ids = torch.tensor([loaded.tokenizer(LONG).input_ids])
    plain = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    expected = loaded.tokenizer.decode(plain[0, ids.shape[1] :])
    for method, config in (("dense", SMALL), ("tokenselect", WIDE), ("streaming", WIDE)):
        llm = LLM(loaded, method, config)
        pieces = list(llm.stream(LONG, max_new_tokens=20))
        assert len(pieces) > 10
        assert "".join(pieces) == llm.generate(LONG, max_new_tokens=20).text == expected


def test_stats(llm: LLM) -> None:
    answer = llm.generate(LONG, max_new_tokens=10)
    stats = answer.stats
    assert stats is llm.stats
    assert not answer.interrupted
    assert (stats.prompt_tokens, stats.cached_tokens, stats.new_tokens) == (120, 0, 10)
    assert stats.ttft_s is not None
    assert stats.ttft_s > 0
    assert stats.prefill_tokens_per_s == pytest.approx(120 / stats.ttft_s)
    assert stats.decode_tokens_per_s is not None
    config = llm.loaded.model.config
    assert stats.kv_bytes == memory.kv_bytes(config, 129, torch.float32)  # the last token is not read
    assert stats.peak_memory_bytes > 50_000_000
    assert (stats.attended_share == 1.0) == (llm.method == "dense")
    assert stats.budget == (None if llm.method == "dense" else SMALL.budget)
    assert json.loads(stats.to_json())["method"] == llm.method


def test_one_new_token_has_no_decode_speed(llm: LLM) -> None:
    stats = llm.generate("w5 w6", max_new_tokens=1).stats
    assert (stats.new_tokens, stats.decode_tokens_per_s, stats.attended_share) == (1, None, 1.0)


def test_selection_cache_hits_are_counted(loaded: LoadedModel) -> None:
    stats = LLM(loaded, config=SMALL.replace(reuse_threshold=0.0)).generate(LONG, max_new_tokens=9).stats
    assert stats.reuse_hit_rate is not None
    assert stats.reuse_hit_rate > 0
    assert LLM(loaded, config=SMALL).generate(LONG, max_new_tokens=9).stats.reuse_hit_rate is None


def test_progress_ends_at_the_number_of_tokens(llm: LLM) -> None:
    calls: list[tuple[int, int]] = []
    llm.generate(LONG, max_new_tokens=4, on_prefill=lambda *call: calls.append(call))
    assert len(calls) > 1
    assert calls == sorted(calls)
    assert calls[-1] == (120, 120)


def test_chat_messages_go_through_the_template(llm: LLM) -> None:
    ids = llm.encode([{"role": "user", "content": "w7 w8"}])
    assert ids == [1, 7, 8, 3]
    assert llm.generate([{"role": "user", "content": "w7"}], max_new_tokens=3).stats.prompt_tokens == 3


def test_sampling_repeats_with_a_seed_and_keeps_the_callers_random_state(loaded: LoadedModel) -> None:
    llm = LLM(loaded, config=SMALL)
    state = torch.get_rng_state()
    texts = [llm.generate(LONG, max_new_tokens=16, temperature=2.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = llm.generate(LONG, max_new_tokens=16).text
    assert llm.generate(LONG, max_new_tokens=16, temperature=2.0, top_k=1).text == greedy
    assert llm.generate(LONG, max_new_tokens=16, temperature=2.0, top_p=1e-6).text == greedy


# ---- several turns


def test_second_turn_reads_only_what_is_new(llm: LLM) -> None:
    with llm.chat() as chat:
        first = chat.generate(LONG, max_new_tokens=8)
        second = chat.generate("w9 w10", max_new_tokens=8)
        assert first.stats.prompt_tokens == 122
        # The history without the first turn's last token, which was never read; marker, question, marker.
        assert second.stats.cached_tokens == 122 + 7
        assert second.stats.prompt_tokens == 122 + 8 + 4
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
        history = chat.messages[:3]
    if llm.method == "dense":
        assert llm.generate(history, max_new_tokens=8).text == second.text


def test_changed_history_is_cropped_to_the_common_prefix(loaded: LoadedModel) -> None:
    llm = LLM(loaded, "dense")
    with llm.chat("w2") as chat:
        chat.generate("w5 w6 w7", max_new_tokens=8)
        chat.messages[-1]["content"] = "w11"
        answer = chat.generate("w9", max_new_tokens=8)
        history = chat.messages[:-1]
    assert answer.stats.cached_tokens in (7, 8)  # one more if the model had said w11 itself
    assert llm.generate(history, max_new_tokens=8).text == answer.text


def test_other_answers_while_a_conversation_is_open(llm: LLM) -> None:
    alone = llm.generate(LONG, max_new_tokens=8).text
    with llm.chat() as chat:
        chat.generate("w5", max_new_tokens=3)
        assert llm.generate(LONG, max_new_tokens=8).text == alone
        assert chat.generate("w6", max_new_tokens=3).stats.cached_tokens > 0


# ---- stopping


def test_ctrl_c_while_reading_keeps_the_conversation(llm: LLM, interrupts: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        interrupts()
        assert llm._running is not None
        assert llm._running._stop.wait(60)  # until the main thread has noticed

    with llm.chat() as chat:
        first = chat.generate("w5 w6", max_new_tokens=4)
        stopped = chat.generate(LONG, max_new_tokens=9, on_prefill=interrupt)
        assert (stopped.text, stopped.interrupted, stopped.stats.ttft_s) == ("", True, None)
        assert len(chat.messages) == 2
        third = chat.generate(LONG, max_new_tokens=9)
        assert third.stats.cached_tokens >= first.stats.prompt_tokens
        history = chat.messages[:3]
    if llm.method == "dense":
        assert third.text == llm.generate(history, max_new_tokens=9).text


def test_ctrl_c_while_writing_gives_what_was_written(llm: LLM, interrupts: Any) -> None:
    def interrupt() -> None:
        while not (llm._running and len(llm._running.tokens) > 3):
            time.sleep(0.01)
        interrupts()

    threading.Thread(target=interrupt).start()
    answer = llm.generate(LONG, max_new_tokens=100_000)
    assert answer.interrupted
    assert 0 < answer.stats.new_tokens < 100_000
    assert (
        answer.text.split()
        == LLM(llm.loaded, llm.method, SMALL).generate(LONG, max_new_tokens=answer.stats.new_tokens).text.split()
    )


def test_closing_a_stream_ends_the_run(llm: LLM) -> None:
    stream = llm.stream(LONG, max_new_tokens=100_000)
    next(stream)
    with pytest.raises(RuntimeError, match="another answer"):
        llm.generate("w5")
    run = llm._running
    stream.close()
    assert run is not None
    assert run._ended.is_set()
    assert llm.generate("w5", max_new_tokens=2).stats.new_tokens == 2


def test_errors_reach_the_caller(llm: LLM) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError("from the callback")

    with pytest.raises(ZeroDivisionError, match="from the callback"):
        llm.generate(LONG, on_prefill=fail)


# ---- bad input


@pytest.mark.parametrize("prompt", ["", "  \n", []], ids=repr)
def test_empty_prompt(loaded: LoadedModel, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"empty|template"):
        LLM(loaded, config=SMALL).stream(prompt)


def test_chat_template_missing_or_failing(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w1"}]
    plain = LLM(save_tiny(tmp_path / "plain", chat=None), config=SMALL)
    with pytest.raises(ValueError, match="no chat template"):
        plain.stream(messages)
    failing = LLM(save_tiny(tmp_path / "failing", chat="{{ raise_exception('odd roles') }}"), config=SMALL)
    with pytest.raises(ValueError, match="odd roles"):
        failing.stream(messages)


def test_unknown_method_is_refused_before_loading() -> None:
    with pytest.raises(ValueError, match=r"method must be one of tokenselect, streaming, dense, .*, got 'best'"):
        LLM("/no/such/model", "best")


def test_budget_beyond_the_window(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"1664 .* 256"):
        LLM(loaded)
    LLM(loaded, "dense")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_bad_sampling(option: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=option):
        Sampling(**{option: value})


def test_not_enough_memory(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 10_000_000)
    with pytest.raises(ValueError, match=r"1,000,001 tokens need 304 MB .* 9 MB can be used: 29,605 would fit"):
        LLM(loaded, config=SMALL).stream("w1", max_new_tokens=1_000_000)


def test_not_enough_memory_for_one_token(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)
    with pytest.raises(ValueError, match=r": 0 would fit"):
        LLM(loaded, config=SMALL).stream("w1")


# ---- methods and memory


def test_streaming_has_the_budget_of_selection() -> None:
    for config in (SMALL, TokenSelectConfig(), TokenSelectConfig.paper().replace(reuse_threshold=2.0)):
        streaming = method_config("streaming", config)
        assert streaming is not None
        assert streaming.num_selected_tokens == 0
        assert streaming.budget == config.budget


def test_methods_undo_everything_after_an_error(loaded: LoadedModel) -> None:
    for method in METHODS:
        with pytest.raises(ZeroDivisionError), attach(loaded.model, method, SMALL, print):
            raise ZeroDivisionError


def test_kv_bytes_of_sliding_layers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    assert memory.kv_bytes(config, 1000, torch.bfloat16) == 3 * 1000 * 2 * 2 * 16 * 2
    config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    config.sliding_window = 100
    assert memory.kv_bytes(config, 1000, torch.bfloat16) == 1200 * 2 * 2 * 16 * 2
    assert memory.kv_bytes(config, 50, torch.bfloat16) == 150 * 2 * 2 * 16 * 2


def test_a_context_that_selects_holds_an_int8_copy_too() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    plain, settings = memory.kv_bytes(config, 1000, torch.bfloat16), TokenSelectConfig(num_dense_tokens=900)
    needed = partial(memory.context_bytes, config, dtype=torch.bfloat16)
    assert needed(1000) == plain
    assert needed(1000, settings=settings) == plain  # within the budget
    settings = settings.replace(num_selected_tokens=128)
    assert needed(1000, settings=settings) == plain + 3 * 1000 * 2 * (16 + 4)
    assert needed(900, settings=settings) == memory.kv_bytes(config, 900, torch.bfloat16)
    assert needed(1000, settings=settings.replace(score_dtype="same")) == plain


def test_peak_memory_sees_what_is_gone_again() -> None:
    before = memory.settled_memory()
    peak = memory.PeakMemory(torch.device("cpu"))
    torch.ones(25_000_000)
    assert peak.read() > before + 50_000_000


def test_readable() -> None:
    numbers = (0, 999, 1_000, 1_500_000, 2_000_000_000, 3e12)
    assert [memory.readable(n) for n in numbers] == ["0 B", "999 B", "1 kB", "2 MB", "2.0 GB", "3000.0 GB"]
