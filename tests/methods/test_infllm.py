"""Memory blocks are ranked by their representatives and attended whole."""

from __future__ import annotations

import pytest
import torch
from layer_case import HEADS, KV_HEADS, SMALL, Layer, middle, rotated

from tokenselect.methods import infllm
from tokenselect.methods.infllm import INFLLM, representatives

GROUP = HEADS // KV_HEADS
WIDE = SMALL.replace(num_selected_tokens=256)


def plain_representatives(query: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    means = []
    for head in range(block.shape[1]):
        scores = [
            sum(float(key @ q) for q in query.view(block.shape[1], -1, block.shape[2])[head]) for key in block[:, head]
        ]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:4]
        means.append(block[best, head].mean(0))
    return torch.stack(means)


@pytest.mark.parametrize("length", [1, 3, 128, 130, 300])
def test_representatives_are_looked_at_most(length: int) -> None:
    query, keys = torch.randn(6, 8), torch.randn(length, 2, 8)
    expected = [plain_representatives(query, keys[i : i + 128]) for i in range(0, length, 128)]
    torch.testing.assert_close(representatives(query, keys), torch.stack(expected))


def plain_choice(layer: Layer, start: int, end: int, memory: list[torch.Tensor]) -> list[int]:
    """Best two memory blocks of a block of queries."""
    mean = layer.queries[start:end].mean(0)
    query = torch.stack([rotated(head, 8) for head in mean]).float()
    for first in range(4 + 128 * len(memory), start - 8, 128):
        memory.append(plain_representatives(query, layer.keys[first : min(first + 128, start - 8)]))
    scores = [sum(float(query[h] @ mean_key[h // GROUP]) for h in range(HEADS)) for mean_key in memory]
    if (start - 8 - 4) % 128:
        memory.pop()  # not full yet: ranked again by the next queries
    best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:2])
    return [token for i in best for token in range(4 + 128 * i, min(132 + 128 * i, start - 8))]


def test_choice_and_memory() -> None:
    layer, memory = Layer(INFLLM, WIDE, length=900), []
    for start, end in [(500, 508), (508, 516), (516, 517), (700, 708), (880, 888)]:
        attended = layer.select((start, end))[0]
        assert middle(attended, start) == plain_choice(layer, start, end, memory)
        assert attended[-(end - start + 8) :] == list(range(start - 8, end))
    assert layer.states[0].other is not None
    assert layer.states[0].other.shape == (len(memory), KV_HEADS, 16)
    assert len(memory) == 6


def test_a_cut_sequence_is_remembered_anew() -> None:
    layer = Layer(INFLLM, WIDE, length=900)
    layer.select((700, 708))
    layer.states[0].forget()
    assert layer.select((500, 508)) == Layer(INFLLM, WIDE, length=900).select((500, 508))


def test_the_budget_is_whole_memory_blocks() -> None:
    assert INFLLM.settings(SMALL).num_selected_tokens == infllm.MEMORY_BLOCK
    assert INFLLM.settings(SMALL.replace(num_selected_tokens=512)).num_selected_tokens == 512
