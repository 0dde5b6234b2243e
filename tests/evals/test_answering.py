"""Answers in process: prefixes change nothing, forced tokens are selected, losses are those of the model."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny

from tokenselect.config import TokenSelectConfig
from tokenselect.evals.answering import Answerer, split_method
from tokenselect.evals.forced import ForcedBackend, token_positions
from tokenselect.evals.perplexity import losses, window_losses
from tokenselect.evals.question import Question
from tokenselect.methods import attach
from tokenselect.models import LoadedModel, load_model
from tokenselect.ops import reference

CONFIG = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=16,
    num_selected_tokens=8,
    num_dense_tokens=0,
    block_size=16,
    num_tail_tokens=4,
    prefill_chunk_size=32,
)
WORDS = [f"w{i * i % 61}" for i in range(200)]
NEEDLE = "w62 w63 w62"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def question(at: int) -> Question:
    prompt = " ".join([*WORDS[:at], NEEDLE, *WORDS[at:]])
    return Question(prompt, ("1",), "first_number", 6, needles=(NEEDLE,), depth=0.5)


@pytest.mark.parametrize("method", ["tokenselect", "streaming", "dense"])
def test_what_prompts_share_changes_no_answer(method: str, loaded: LoadedModel) -> None:
    alone = []
    for at in (150, 120, 20):
        with Answerer(loaded, method, CONFIG) as answerer:
            alone.append(answerer.answer(question(at)))
    with Answerer(loaded, method, CONFIG) as answerer:
        assert [answerer.answer(question(at)) for at in (150, 120, 20)] == alone


def test_the_needle_is_in_every_selection_that_may_have_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[int, set[int]]] = []
    original = ForcedBackend.topk_tokens

    def watched(self: ForcedBackend, votes: torch.Tensor, start_loc: torch.Tensor, k: int) -> torch.Tensor:
        found = original(self, votes, start_loc, k)
        sizes = start_loc.diff().tolist()
        chosen.extend((size, set((row + 4).tolist())) for size, row in zip(sizes, found, strict=True))
        return found

    monkeypatch.setattr(ForcedBackend, "topk_tokens", watched)
    with Answerer(loaded, "tokenselect+forced", CONFIG) as answerer:
        answerer.answer(question(50))
    may = [positions for size, positions in chosen if size + 4 > 52]
    assert len(may) > 20
    assert all({50, 51, 52} <= positions for positions in may)
    assert any(size + 4 <= 50 for size, _ in chosen)


def test_forcing_nothing_changes_nothing() -> None:
    votes, start_loc = torch.rand(30), torch.tensor([0, 10, 30])
    backend = ForcedBackend(reference, 4)  # type: ignore[arg-type]
    assert torch.equal(backend.topk_tokens(votes, start_loc, 5), reference.topk_tokens(votes, start_loc, 5))
    backend.positions = torch.tensor([2, 7, 20])  # a sink, a candidate of both, a candidate of the second alone
    first, second = backend.topk_tokens(votes, start_loc, 5).tolist()
    assert 3 in first
    assert {3, 16} <= set(second)
    assert backend.NAME == "reference"


def test_tokens_of_a_needle_are_found_by_character() -> None:
    offsets = [(0, 2), (2, 5), (5, 6), (6, 9)]
    assert token_positions(offsets, "abcdefghi", ("de", "g")) == [1, 3]
    with pytest.raises(ValueError, match="does not hold the needle 'xyz'"):
        token_positions(offsets, "abcdefghi", ("xyz",))


def test_a_task_without_a_needle_has_no_ceiling(loaded: LoadedModel) -> None:
    plain = Question(" ".join(WORDS), ("1",), "first_number", 2)
    with Answerer(loaded, "tokenselect+forced", CONFIG) as answerer, pytest.raises(ValueError, match="no needles"):
        answerer.answer(plain)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse", "method must be one of tokenselect"),
        ("tokenselect+magic", "the option of a method must be one of select, forced, got 'magic'"),
        ("dense+select", "only tokenselect has options, got 'dense\\+select'"),
    ],
)
def test_what_is_no_method_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_method(name)


def test_losses_are_those_of_the_models_logits(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer(" ".join(WORDS), return_tensors="pt").input_ids[0]
    logits = loaded.model(ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(losses(loaded.model, ids), expected, rtol=1e-4, atol=1e-4)
    with attach(loaded.model, "tokenselect", CONFIG, None):
        selected = losses(loaded.model, ids)
    torch.testing.assert_close(selected[:28], expected[:28], rtol=1e-4, atol=1e-4)
    assert (selected[60:] - expected[60:]).abs().max() > 1e-3


def test_a_window_reads_every_block_after_the_tokens_before_it(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer(" ".join(WORDS), return_tensors="pt").input_ids[0]
    windowed = window_losses(loaded.model, ids, context=32, block=16)
    assert windowed.shape == (len(ids) - 1,)
    torch.testing.assert_close(windowed[:47], losses(loaded.model, ids[:48]), rtol=1e-4, atol=1e-4)
    alone = losses(loaded.model, ids[64:113])  # 32 tokens, the block 96 .. 111, and the token after it
    torch.testing.assert_close(windowed[96:112], alone[32:48], rtol=1e-4, atol=1e-4)
