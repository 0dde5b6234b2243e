"""Votes by head are the votes, head by head; attention mass is that of dense attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenselect.ops import reference
from tokenselect.ops.explain import attention_mass, votes_by_head
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import Distances

LENGTH, HQ, HKV, DIM = 203, 6, 2, 16


def _pages() -> PageTable:
    """Three pages of 70 tokens that lie in no order, the first one begun by 2 rows of padding."""
    return PageTable(torch.tensor([[2, 0, 1]]), 70, [2])


def _views(first: int, last: int) -> list[Distances]:
    runs = -(-(last - first) // 64)
    angles = torch.rand(runs + 1, DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    return [
        Distances(cos[:1], sin[:1], 1, torch.tensor([0, 1])),
        Distances(cos[1:], sin[1:], 64, torch.tensor([0, runs])),
    ]


@pytest.mark.parametrize("context", [None, (0, 201)], ids=["candidates", "wider context"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["keys", "int8 copy"])
def test_heads_sum_to_the_votes(context: tuple[int, int] | None, is_int8: bool) -> None:
    keys = torch.randn(210, HKV, DIM)
    copy: tuple[Tensor, ...] = ()
    if is_int8:
        center = torch.randn(1, HKV, DIM)
        keys, scales = reference.quantize_rows(keys, center[0])
        copy = (scales, center)
    candidates = torch.tensor([[5, 180]])
    spans = None if context is None else torch.tensor([context])
    views = _views(*(context or (5, 180)))
    queries, sequences = torch.randn(1, HQ, DIM), torch.tensor([0])
    votes, _ = reference.score_tokens(queries, keys, _pages(), sequences, candidates, views, 0.3, spans, *copy)
    positions = torch.tensor([5, 6, 99, 179])
    by_head = votes_by_head(queries, keys, _pages(), 0, candidates, views, 0.3, positions, spans, *copy)
    assert by_head.shape == (4, HQ)
    torch.testing.assert_close(by_head.sum(1), votes[positions - 5])
    outside = votes_by_head(
        queries, keys, _pages(), 0, candidates, views, 0.3, torch.tensor([0, 4, 180, 202]), spans, *copy
    )
    assert not outside.any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_mass(interleaved: bool) -> None:
    keys, query = torch.randn(210, HKV, DIM), torch.randn(HQ, DIM)
    angles = torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0.3, 0.1])  # partial rotary
    cos, sin = angles.cos(), angles.sin()
    attended = torch.tensor([0, 1, 50, 150, 202])
    mass = attention_mass(query, keys, _pages(), 0, attended, cos, sin, 0.3, interleaved)

    rows = keys[_pages().slots(0, torch.arange(LENGTH))]
    turned = reference.rotate(rows, cos[:, None], sin[:, None], interleaved)
    own = reference.rotate(query, cos[-1], sin[-1], interleaved)
    by_head = [torch.softmax(turned[:, h // 3] @ own[h] * 0.3, 0)[attended].sum() for h in range(HQ)]
    assert mass == pytest.approx(float(torch.stack(by_head).mean()), rel=1e-5)
    everything = attention_mass(query, keys, _pages(), 0, torch.arange(LENGTH), cos, sin, 0.3, interleaved)
    assert everything == pytest.approx(1.0)
