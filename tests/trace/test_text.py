"""Every token has its part of the text, and the parts are the text."""

from __future__ import annotations

import pytest
from tiny import LONG, save_tiny

from tokenselect.embedded import embedded_model_path
from tokenselect.models import load_model
from tokenselect.trace.text import token_texts


@pytest.mark.parametrize("text", ["plain words", "née \U0001f600 中文字 tab\t\n\n end", "<|im_start|>user\n</script>"])
def test_bytes_that_make_one_character(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    ids = tokenizer(text)["input_ids"]
    joined, starts = token_texts(tokenizer, ids)
    assert joined == text
    assert len(starts) == len(ids)
    assert starts == sorted(starts)
    assert starts[0] == 0


def test_words(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny")).tokenizer
    text, starts = token_texts(tokenizer, tokenizer(LONG)["input_ids"])
    assert text.split() == LONG.split()
    assert len(starts) == 120


def test_a_tokenizer_that_is_not_fast() -> None:
    class Slow:
        def decode(self, ids: list[int]) -> str:
            return "abc"[: ids[0]]

    assert token_texts(Slow(), [1, 2, 0, 3]) == ("aababc", [0, 1, 3, 3])
