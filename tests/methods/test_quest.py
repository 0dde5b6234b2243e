"""Pages are ranked by the largest logit that their bounds allow."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from layer_case import DIM, HEADS, KV_HEADS, SCALE, Layer, middle, rotated

from tokenselect.methods.quest import PAGE_SIZE, QUEST, largest_logits, page_bounds
from tokenselect.selection import Block


@pytest.mark.parametrize("length", [1, 15, 16, 17, 48, 50])
def test_bounds_are_those_of_each_page(length: int) -> None:
    keys = torch.randn(length, 2, 3)
    low, high = page_bounds(keys)
    assert len(low) == len(high) == -(-length // PAGE_SIZE)
    for page in range(len(low)):
        own = keys[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        assert torch.equal(low[page], own.min(0).values)
        assert torch.equal(high[page], own.max(0).values)


def test_the_largest_logit_is_the_best_corner() -> None:
    queries, keys = torch.randn(3, 4, 3), torch.randn(5 * PAGE_SIZE, 2, 3)
    low, high = page_bounds(keys)
    found = largest_logits(queries, low, high, per_run=2)  # runs of two pages, the last of one
    assert found.shape == (4, 5)
    for head, page in product(range(4), range(5)):
        query, ends = queries[page // 2, head], (low[page, head // 2], high[page, head // 2])
        corners = torch.stack([torch.stack(ends)[list(corner), range(3)] for corner in product((0, 1), repeat=3)])
        torch.testing.assert_close(found[head, page], (corners @ query).max())
        logits = keys[page * PAGE_SIZE : (page + 1) * PAGE_SIZE, head // 2] @ query
        assert logits.max() <= found[head, page] + 1e-5


@pytest.mark.parametrize("start", [200, 205])
def test_votes_by_head_and_page(start: int) -> None:
    layer = Layer(QUEST)
    plan = layer.plan(Block(0, start, start + 1, 0))
    pooled = torch.randn(1, HEADS, DIM)
    arguments = (layer.keys, layer.pages, plan.sequences, plan.candidates, plan.distances, SCALE)
    votes, start_loc = layer.ops.score_tokens(pooled, *arguments)
    first, end = 4, start - 8
    assert start_loc.tolist() == [0, end - first]
    low, high = page_bounds(layer.keys[first:end])
    expected = torch.zeros(len(low), dtype=torch.float64)
    for head in range(HEADS):
        logits = []
        for page in range(len(low)):
            run = first + page // 4 * 64  # the query is turned by the mean rotation of 64 distances
            nearest = max(0, start - run - 63)
            turns = [rotated(pooled[0, head], distance) for distance in range(nearest, nearest + 64)]
            query, kv = torch.stack(turns).mean(0), head // (HEADS // KV_HEADS)
            logits.append(torch.maximum(query * low[page, kv], query * high[page, kv]).sum() * SCALE)
        expected += torch.softmax(torch.stack(logits), dim=0)
    torch.testing.assert_close(
        votes.double(), expected.repeat_interleave(PAGE_SIZE)[: end - first], rtol=1e-3, atol=1e-5
    )


def test_whole_pages_are_chosen() -> None:
    chosen = middle(Layer(QUEST).select((200, 208))[0], 200)
    assert len(chosen) == 32
    assert [token - chosen[0] for token in chosen[:16]] == list(range(16))
    assert all((token - 4) // 16 in ((chosen[0] - 4) // 16, (chosen[-1] - 4) // 16) for token in chosen)


def test_blocks_of_one_pass_choose_as_alone() -> None:
    spans = [(200, 208), (208, 209), (209, 210)]
    assert Layer(QUEST).select(*spans) == [Layer(QUEST).select(span)[0] for span in spans]
