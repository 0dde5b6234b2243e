"""The published code's vote: other key heads, bfloat16, no scale."""

from __future__ import annotations

import torch
from layer_case import DIM, HEADS, KV_HEADS, Layer, rotated

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.paper import PAPER
from tokenselect.methods.published import PUBLISHED, modulo_order
from tokenselect.selection import Block


def test_heads_of_a_group_are_those_with_equal_remainder() -> None:
    assert modulo_order(6, 2) == [0, 2, 4, 1, 3, 5]
    assert modulo_order(3, 1) == [0, 1, 2]
    assert modulo_order(9, 3) == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_votes_are_those_of_the_published_code() -> None:
    layer = Layer(PUBLISHED, length=900)
    layer.config = layer.config.replace(num_sink_tokens=2, num_local_tokens=16, block_size=16)
    plan = layer.plan(Block(0, 80, 96, 0), Block(0, 96, 112, 16))
    pooled = torch.randn(2, HEADS, DIM)
    votes, start_loc = layer.ops.score_tokens(
        pooled, layer.keys, layer.pages, plan.sequences, plan.candidates, plan.distances, 1.0
    )
    assert start_loc.tolist() == [0, 78, 172]
    for i, end in enumerate((80, 96)):
        keys = layer.keys[2:end].bfloat16()
        expected = torch.zeros(end - 2, dtype=torch.bfloat16)
        for head in range(HEADS):
            query = rotated(pooled[i, head], 16).bfloat16()
            expected += torch.softmax(keys[:, head % KV_HEADS] @ query, dim=0)
        found = votes[start_loc[i] : start_loc[i + 1]]
        assert torch.equal(found, found.bfloat16().float())  # nothing finer than bfloat16
        torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0.02)


def test_settings_are_the_papers_and_the_cache_is_off() -> None:
    asked = TokenSelectConfig(num_selected_tokens=77, backend="reference", prefill_chunk_size=512)
    paper, published = PAPER.settings(asked), PUBLISHED.settings(asked)
    assert paper == TokenSelectConfig.paper().replace(score_dtype="same", backend="reference", prefill_chunk_size=512)
    assert paper.reuse
    assert not paper.scale_votes
    assert published == paper.replace(reuse_threshold=2.0)
