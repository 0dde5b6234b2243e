"""A trace holds what the layers really selected; recording changes nothing; replayed layers record too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import LONG, save_tiny

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.steps import Steps
from tokenselect.llm import LLM
from tokenselect.models import LoadedModel, load_model
from tokenselect.selection import select_tokens
from tokenselect.trace import Trace

SMALL = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=16,
    num_selected_tokens=16,
    block_size=16,
    num_tail_tokens=4,
    prefill_chunk_size=16,
    num_dense_tokens=0,
)
NEW = 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `select_tokens` returned for the blocks of every layer, in order."""
    seen: list[Any] = []

    def spy(queries: Any, keys: Any, pages: Any, plan: Any, *rest: Any) -> Any:
        chosen = original(queries, keys, pages, plan, *rest)
        seen.append([(block.end - 1, positions.tolist()) for block, positions in zip(plan.blocks, chosen, strict=True)])
        return chosen

    original = select_tokens
    monkeypatch.setattr("tokenselect.integrations.transformers.select_tokens", spy)
    return seen


def _attended(trace: Trace, step: int, layer: int) -> list[int]:
    """What a cell of a trace says was attended."""
    window, query = int(trace.windows[step, layer]), trace.num_prompt_tokens - 1 + step
    selected = trace.indices[trace.cell(step, layer)].tolist()
    return [*range(min(trace.num_sinks, window)), *selected, *range(window, query + 1)]


@pytest.mark.parametrize("reuse", [2.0, 0.5], ids=["no cache", "cache"])
@pytest.mark.parametrize("tail", [4, 0], ids=["tail", "no tail"])
def test_a_trace_holds_what_was_attended(loaded: LoadedModel, selections: list[Any], reuse: float, tail: int) -> None:
    config = SMALL.replace(reuse_threshold=reuse, num_tail_tokens=tail)
    llm = LLM(loaded, config=config, trace=True)
    answer = llm.generate(LONG, max_new_tokens=NEW)
    trace = llm.trace
    assert trace is not None
    assert (trace.num_steps, trace.num_layers, trace.num_prompt_tokens) == (NEW, 2, 120)
    wanted: dict[int, list[list[int]]] = {}
    for blocks in selections:
        for query, positions in blocks:
            wanted.setdefault(query, []).append(positions)
    for step in range(NEW):
        for layer in range(2):
            assert _attended(trace, step, layer) == wanted[119 + step][layer]
            assert trace.attended()[step, layer] == len(wanted[119 + step][layer])
    hits = trace.served[trace.served >= 0]
    rate = answer.stats.reuse_hit_rate
    assert (rate is None and not len(hits)) or hits.mean() == pytest.approx(rate)
    assert (reuse > 1) == (rate is None)


def test_recording_changes_nothing(loaded: LoadedModel) -> None:
    plain, traced = (LLM(loaded, config=SMALL, trace=trace) for trace in (False, True))
    assert plain.generate(LONG, max_new_tokens=NEW).text == traced.generate(LONG, max_new_tokens=NEW).text
    assert plain.trace is None
    assert plain._recorder is None


def test_replayed_layers_record(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(save_tiny(tmp_path_factory.mktemp("models") / "wide", num_attention_heads=2))

    def trace() -> Trace:
        llm = LLM(loaded, config=SMALL, trace=True)
        llm.generate(LONG, max_new_tokens=NEW)
        assert llm.trace is not None
        return llm.trace

    replays = []
    original = Steps.find

    def find(*args: Any) -> Any:
        replays.append(original(*args))
        return replays[-1]

    monkeypatch.setattr(Steps, "find", find)
    replayed = trace()
    assert sum(program is not None for program in replays) >= 2 * (NEW - 1)
    monkeypatch.setattr(Steps, "find", lambda *args: None)
    plain = trace()
    assert np.array_equal(replayed.indices, plain.indices)
    np.testing.assert_allclose(replayed.votes, plain.votes, atol=1e-3)


@pytest.mark.parametrize(("scoring", "num_views"), [("merged", 1), ("mix", 2)])
def test_votes_are_those_of_the_choice(
    scoring: Any, num_views: int, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    llm = LLM(loaded, config=SMALL.replace(backend="reference", scoring=scoring, vote_horizon=0), trace=True)
    from tokenselect.ops import reference

    original = reference.score_tokens

    def score(*args: Any, **kwargs: Any) -> Any:
        votes, start_loc = original(*args, **kwargs)
        given.append(votes[start_loc[-2] :])
        return votes, start_loc

    monkeypatch.setattr(reference, "score_tokens", score)
    llm.generate(LONG, max_new_tokens=NEW)
    trace = llm.trace
    assert trace is not None
    last = given[-2 * NEW :]
    for cell, votes in enumerate(last):
        own = slice(trace.start_loc[cell], trace.start_loc[cell + 1])
        expected = votes[trace.indices[own] - trace.num_sinks] / num_views
        np.testing.assert_allclose(trace.votes[own].astype(np.float32), expected, rtol=2e-3, atol=1e-5)
        shares = trace.head_shares[own].astype(float).sum(1) / 255
        np.testing.assert_allclose(shares, 1, atol=0.01)


def test_attention_mass_within_the_window_only(loaded: LoadedModel) -> None:
    llm = LLM(loaded, config=SMALL, trace=True)
    llm.generate(LONG, max_new_tokens=4)
    assert llm.trace is not None
    assert ((llm.trace.mass > 0) & (llm.trace.mass < 1)).all()
    llm.generate(" ".join([LONG] * 3), max_new_tokens=4)  # 360 tokens of a window of 256
    assert np.isnan(llm.trace.mass).all()


def test_nothing_is_selected_where_all_is_attended(loaded: LoadedModel) -> None:
    llm = LLM(loaded, config=SMALL.replace(num_dense_tokens=256), trace=True)
    llm.generate(LONG, max_new_tokens=4)
    assert llm.trace is not None
    assert (llm.trace.num_layers, len(llm.trace.indices)) == (0, 0)


def test_every_turn_has_its_trace(loaded: LoadedModel) -> None:
    llm = LLM(loaded, config=SMALL, trace=True)
    with llm.chat() as conversation:
        for turn in range(2):
            answer = conversation.generate(LONG, max_new_tokens=5)
            trace = llm.trace
            assert trace is not None
            assert trace.num_prompt_tokens == answer.stats.prompt_tokens
            assert trace.num_steps == 5
            assert trace.answer.split() == answer.text.split()
            assert trace.num_tokens > 120 * (turn + 1)


def test_what_is_too_large_is_counted(loaded: LoadedModel) -> None:
    llm = LLM(loaded, config=SMALL, trace=True)
    llm.generate(LONG, max_new_tokens=NEW)
    assert llm.trace is not None
    one_step = sum(cell.nbytes for cell in llm._recorder.cells[119].values())  # type: ignore[union-attr]
    llm._recorder.max_bytes = 3 * one_step - 1  # type: ignore[union-attr]
    llm.generate(LONG, max_new_tokens=NEW)
    assert llm.trace.num_steps == 3
    assert llm.trace.facts["dropped_steps"] == NEW - 3


def test_only_selection_has_a_trace(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="method must be 'tokenselect', got 'dense'"):
        LLM(loaded, "dense", trace=True)
