"""Fidelity counts what a choice keeps of dense attention, and the choices are those of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import save_tiny

from tokenselect.config import TokenSelectConfig
from tokenselect.evals import fidelity, truth
from tokenselect.evals.fidelity import Candidate, measure_fidelity
from tokenselect.methods import choice
from tokenselect.models import LoadedModel, load_model

SMALL = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=16,
    num_selected_tokens=16,
    num_dense_tokens=0,
    block_size=16,
    num_tail_tokens=4,
)
LENGTH = 200


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "NUM_TAIL", 8)
    monkeypatch.setattr(fidelity, "NUM_STEPS", 8)


def candidate(method: str, config: TokenSelectConfig = SMALL) -> Candidate:
    found = choice(method)
    assert found is not None
    return Candidate(method, found, config)


METHODS = ("tokenselect", "streaming", "infllm", "quest", "snapkv")


def test_figures_of_all_methods(loaded: LoadedModel) -> None:
    ids = torch.randint(64, (1, LENGTH))
    found = measure_fidelity(loaded, ids, [candidate(method) for method in METHODS])
    assert {key[0] for key in found} == {*METHODS, *fidelity.ORACLES}
    assert {key[2] for key in found} == {0, 1}
    for (method, phase, layer), sums in found.items():
        figures = sums.figures()
        assert 0 < figures["mass"] <= 1
        assert figures["middle_mass"] <= found["oracle_heads", phase, layer].figures()["middle_mass"] + 0.2
        if method not in fidelity.ORACLES:
            assert 0 <= figures["recall_shared"] <= 1
            assert figures["output_error"] > 0
    for phase in fidelity.PHASES:
        shared, heads, ours, recent = (
            found[name, phase, 0].figures()["middle_mass"]
            for name in ("oracle_shared", "oracle_heads", "tokenselect", "streaming")
        )
        assert heads >= shared >= max(ours, recent)


def test_spans_that_the_budget_covers_are_not_counted(loaded: LoadedModel) -> None:
    ids = torch.randint(64, (1, LENGTH))
    wide = replace(SMALL, num_selected_tokens=LENGTH)
    found = measure_fidelity(loaded, ids, [candidate("tokenselect"), Candidate("wide", choice("tokenselect"), wide)])
    assert found["wide", "prefill", 0].figures() == dict.fromkeys(fidelity.Sums().figures())
    assert found["tokenselect", "prefill", 0].total > 0


def test_a_tail_that_the_budget_covers_is_not_counted(loaded: LoadedModel) -> None:
    """One block for the tail, which begins within the budget of a larger k."""
    wide = replace(SMALL, num_selected_tokens=LENGTH - 40, num_tail_tokens=0)
    found = measure_fidelity(
        loaded,
        torch.randint(64, (1, LENGTH)),
        [candidate("tokenselect"), Candidate("wide", choice("tokenselect"), wide)],
    )
    assert found["wide", "tail", 0].total == 0
    assert found["wide", "decode", 0].total > 0


def test_spans_compared_together_count_as_one_by_one(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(64, (1, LENGTH))
    candidates = [candidate(method) for method in METHODS]
    together = measure_fidelity(loaded, ids, candidates)
    monkeypatch.setattr(truth, "_QUERIES_AT_ONCE", 1)
    alone = measure_fidelity(loaded, ids, candidates)
    for key, sums in together.items():
        assert alone[key].figures() == pytest.approx(sums.figures(), abs=2e-5)


def test_without_oracles(loaded: LoadedModel) -> None:
    found = measure_fidelity(loaded, torch.randint(64, (1, LENGTH)), [candidate("streaming")], oracles=False)
    assert {key[0] for key in found} == {"streaming"}


def test_beyond_the_window_there_is_no_truth(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="within the trained window of 256 tokens, got 300"):
        measure_fidelity(loaded, torch.randint(64, (1, 300)), [candidate("tokenselect")])


def test_mass_by_hand(loaded: LoadedModel) -> None:
    """Streaming's share is the attention of Transformers itself to sinks and the window."""
    ids = torch.randint(64, (1, LENGTH))
    found = measure_fidelity(loaded, ids, [candidate("streaming_same_window")])
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = loaded.model(ids, output_attentions=True).attentions
    loaded.model.set_attn_implementation("sdpa")
    for layer, attention in enumerate(attentions):
        kept = [float(attention[0, :, at, :4].sum() + attention[0, :, at, at - 16 :].sum()) for at in range(192, 200)]
        sums = found["streaming_same_window", "decode", layer]
        assert sums.total == pytest.approx(8 * 4, rel=1e-4)
        assert sums.mass == pytest.approx(sum(kept), rel=1e-3)
        blocks = range(32, 184, 16)  # the first that the budget does not cover
        kept = []
        for start in blocks:
            own = attention[0, :, start : min(start + 16, 184)]
            kept.append(float(own[..., :4].sum() + own[..., start - 16 :].sum()))
        assert found["streaming_same_window", "prefill", layer].mass == pytest.approx(sum(kept), rel=1e-3)


def test_decode_counts_reuse(loaded: LoadedModel) -> None:
    ids = torch.randint(64, (1, LENGTH))
    found = measure_fidelity(loaded, ids, [candidate("tokenselect", replace(SMALL, reuse_threshold=0.0))])
    sums = found["tokenselect", "decode", 0]
    assert sums.lookups == 8
    assert 0 < sums.hits < 8  # the first has nothing to reuse
    assert found["tokenselect", "tail", 0].hits == 0
