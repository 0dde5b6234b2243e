"""Turns and quantiles: what keeps a comparison fair."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest
import torch
from tiny import save_tiny

from tokenselect import measure
from tokenselect.config import TokenSelectConfig
from tokenselect.measure import alternate, quantiles, read_and_write, warm_up
from tokenselect.models import LoadedModel, load_model

if TYPE_CHECKING:
    pass

METHODS = ("tokenselect", "streaming", "dense")
SMALL = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=16,
    num_selected_tokens=16,
    num_dense_tokens=0,
    block_size=16,
    num_tail_tokens=4,
    prefill_chunk_size=32,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (1.0, 2.5, 4.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_turns_go_back_and_forth() -> None:
    order: list[str] = []
    results = alternate({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abccbaabc"
    assert results == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_who_takes_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(step=0.5)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    slow, quick = [next(clock) for _ in range(8)], [0]
    results = alternate({"slow": lambda: slow.append(next(clock)), "quick": lambda: quick.append(1)}, 4, 1.0)
    assert [len(runs) for runs in results.values()] == [1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_what_generate_writes(loaded: LoadedModel, method: str) -> None:
    ids = torch.randint(64, (1, 120))
    run = read_and_write(loaded, ids, method, SMALL, 5)
    from tokenselect.methods import attach

    with attach(loaded.model, method, SMALL):
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert run.tokens == out[0, 120:].tolist()
    assert len(run.steps_s) == 5
    assert run.prefill_s > 0
    assert [done for done, _ in run.progress] == ([] if method == "dense" else [48, 80, 112, 120])


def test_a_warm_up_selects_but_reads_no_more_than_it_must(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(measure, "read_and_write", lambda loaded, ids, *rest: lengths.append(ids.shape[1]))
    for method in METHODS:
        warm_up(loaded, torch.zeros(1, 1000, dtype=torch.int64), method, SMALL)
    assert lengths[0] > SMALL.budget
    assert lengths == [84, 84, 32]
