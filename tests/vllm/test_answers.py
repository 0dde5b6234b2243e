"""What the engine writes: as stock vLLM and as Transformers where they must agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.engines import CONFIG, SETTINGS, answers, engine, prompt
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.transformers import TokenSelect

SHORT = [5, 31, 64, 100, 177, 240]
LONG = [70, 129, 300, 1000, 4097]


def _transformers(folder: Path, config: TokenSelectConfig, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with TokenSelect(model, config):
        return [
            model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :].tolist()
            for ids in prompts
        ]


def test_whole_contexts_are_answered_as_stock_vllm_answers(model: Path) -> None:
    prompts = [prompt(length, length) for length in SHORT]
    whole = {**SETTINGS, "num_dense_tokens": 256}
    with engine(model, None, max_model_len=256) as llm:
        stock = answers(llm, prompts)
    with engine(model, whole, max_model_len=256) as llm:
        assert answers(llm, prompts) == stock
    assert _transformers(model, CONFIG.replace(num_dense_tokens=256), prompts, 8) == stock
    assert len({tuple(answer) for answer in stock}) == len(stock)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_dtype": "same", "scoring": "position_free", "head_weights": True},
        {"reuse_threshold": 0.5, "num_dense_tokens": 0},
        {"num_selected_tokens": 0, "local_includes_block": True, "num_local_tokens": 40},
    ],
    ids=["defaults", "exact keys", "reuse", "sinks and local"],
)
def test_selecting_contexts_are_answered_as_transformers_answers(model: Path, changes: dict[str, object]) -> None:
    prompts = [prompt(length, length) for length in LONG]
    settings = {**SETTINGS, **changes}
    with engine(model, settings) as llm:
        ours = answers(llm, prompts, 12)
    assert ours == _transformers(model, TokenSelectConfig(**settings), prompts, 12)


def test_a_context_that_outgrows_what_is_attended_whole_begins_to_select(model: Path) -> None:
    prompts = [prompt(60, 1), prompt(62, 2)]
    with engine(model, SETTINGS) as llm:
        ours = answers(llm, prompts, 20)
    assert ours == _transformers(model, CONFIG, prompts, 20)
