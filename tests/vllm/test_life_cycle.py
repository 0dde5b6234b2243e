"""Requests that come, wait, are preempted, share and go: each is answered as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from tests.vllm.engines import SETTINGS, answers, engine, greedy, prompt
from tokenselect.integrations.vllm.backend import TokenSelectBuilder
from tokenselect.integrations.vllm.scheduler import TokenSelectScheduler

TOKENS = 10


def _prompts() -> list[list[int]]:
    """16 prompts of 5 to 20,000 tokens; half of them begin alike, and one continues another."""
    document = prompt(3000, 0)
    lengths = [5, 33, 64, 65, 200, 777, 5000, 20_000]
    alone = [prompt(length, 100 + length) for length in lengths]
    sharing = [document[:part] + prompt(own, own) for part, own in [(2990, 40), (3000, 65), (1000, 1), (64, 500)]]
    return [*alone, *sharing, document, sharing[0] + prompt(300, 7), document[:1500], document[:63]]


PROMPTS = _prompts()


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    with engine(model, SETTINGS) as llm:
        return [answers(llm, [ids], TOKENS)[0] for ids in PROMPTS]


class _Run:
    """An engine fed by hand."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.preempted = 0
        self.cached = 0
        self.finished: dict[str, list[int]] = {}

    def add(self, name: str, ids: list[int], **extra: Any) -> None:
        self.engine.add_request(name, {"prompt_token_ids": ids}, greedy(TOKENS, **extra))

    def step(self) -> None:
        _fill_free_blocks(self)
        for output in self.engine.step():
            if output.finished:
                self.finished[output.request_id] = list(output.outputs[0].token_ids)
                self.cached = max(self.cached, output.num_cached_tokens or 0)
        requests = self.scheduler.requests.values()
        self.preempted = max([self.preempted, *(request.num_preemptions for request in requests)])

    def until_done(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()


@torch.inference_mode()
def _fill_free_blocks(run: _Run) -> None:
    """What nobody holds, and no later request may find, is not a number."""
    free = [
        block.block_id
        for block in run.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()
        if block.block_hash is None
    ]
    runner = run.core.model_executor.driver_worker.worker.model_runner
    for layer in runner.compilation_config.static_forward_context.values():
        layer.kv_cache[free] = torch.nan
        copy = layer.impl._copy
        if copy is not None:
            copy.scales[free] = torch.nan


def _arrivals(run: _Run, seed: int) -> Iterator[str]:
    """Let the prompts arrive in random order at random steps."""
    random = Random(seed)
    order = random.sample(range(len(PROMPTS)), len(PROMPTS))
    for index in order:
        run.add(str(index), PROMPTS[index])
        yield str(index)
        for _ in range(random.randrange(4)):
            run.step()


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, {}),
        (2, {"enable_prefix_caching": True, "max_num_batched_tokens": 331}),
        (3, {"enable_prefix_caching": True, "kv_cache_memory_bytes": 21 << 20, "max_num_batched_tokens": 1007}),
    ],
    ids=["together", "prefix caching, odd chunks", "preemption"],
)
def test_requests_at_random_times_are_answered_as_alone(
    model: Path, alone: list[list[int]], seed: int, options: dict[str, Any]
) -> None:
    with engine(model, SETTINGS, **options) as llm:
        run = _Run(llm)
        for _ in _arrivals(run, seed):
            pass
        run.until_done()
        for index in range(len(PROMPTS)):  # now what can be found in the cache is found
            run.add(f"again {index}", PROMPTS[index])
        run.until_done()
    assert {name: answer == alone[int(name.split()[-1])] for name, answer in run.finished.items()} == dict.fromkeys(
        run.finished, True
    )
    assert len(run.finished) == 2 * len(PROMPTS)
    assert (run.preempted > 0) == ("kv_cache_memory_bytes" in options)
    assert (run.cached > 0) == ("enable_prefix_caching" in options)


def test_aborted_requests_leave_nothing_behind(model: Path, alone: list[list[int]]) -> None:
    with engine(model, SETTINGS, max_num_batched_tokens=331) as llm:
        run = _Run(llm)
        for name in _arrivals(run, 4):
            if int(name) % 3 == 0:
                run.engine.abort_request([name])
        run.until_done()
        run.step()
        groups = run.core.model_executor.driver_worker.worker.model_runner.attn_groups
        builders = [group.get_metadata_builder() for part in groups for group in part]
        assert all(isinstance(builder, TokenSelectBuilder) for builder in builders)
        run.add("last", PROMPTS[4])
        run.until_done()
        assert all(len(builder.requests) <= 1 for builder in builders)
        pool = run.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
    kept = {name: answer for name, answer in run.finished.items() if name != "last"}
    assert kept == {name: alone[int(name)] for name in kept}
    assert len(kept) == len(PROMPTS) - 6
    assert run.finished["last"] == alone[4]


def test_requests_with_their_own_settings_share_no_blocks(model: Path) -> None:
    ids = PROMPTS[5]
    with engine(model, SETTINGS, enable_prefix_caching=True) as llm:
        first = answers(llm, [ids], TOKENS)[0]
        fewer = answers(llm, [ids], TOKENS, tokenselect_k=4)[0]
        run = _Run(llm)
        for name, extra in [("own", {}), ("fewer", {"tokenselect_k": 4})]:
            run.add(name, ids, **extra)
        run.until_done()
        assert run.finished == {"own": first, "fewer": fewer}
    with engine(model, {**SETTINGS, "num_selected_tokens": 4}) as llm:
        assert answers(llm, [ids], TOKENS)[0] == fewer
    assert fewer != first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tokenselect_k": 17}, "tokenselect_k must be a whole number between 1 and 16, got 17"),
        ({"tokenselect_k": 0}, "tokenselect_k must be"),
        ({"tokenselect_k": "many"}, "got 'many'"),
        ({"tokenselect_kk": 3}, "unknown setting tokenselect_kk"),
        ({"tokenselect_dense_tokens": 65}, "between 0 and 64"),
    ],
)
def test_wrong_settings_of_a_request_are_refused(
    model: Path, engine_of_refusals: LLM, extra: Any, message: str
) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        answers(engine_of_refusals, [PROMPTS[0]], 1, **extra)


@pytest.fixture(scope="module")
def engine_of_refusals(model: Path) -> Iterator[LLM]:
    with engine(model, SETTINGS) as llm:
        yield llm


@pytest.mark.parametrize("limits", [(), (96,)], ids=["vLLM 0.32", "vLLM 0.33"])
def test_a_limit_of_the_look_up_of_cached_blocks_is_handed_on(
    limits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def look_up(*given: Any) -> tuple[str, int, int]:
        asked.append(given)
        return "blocks", 64, 0

    scheduler = object.__new__(TokenSelectScheduler)  # of an engine that does not run
    monkeypatch.setattr(scheduler, "_look_up", look_up, raising=False)
    monkeypatch.setattr(scheduler, "_attends_whole", lambda request: True)
    assert scheduler._get_computed_blocks("request", *limits) == ("blocks", 64, 0)
    assert asked == [("request", *limits)]
