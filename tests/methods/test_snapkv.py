"""The last queries decide what is kept, and what was dropped stays dropped."""

from __future__ import annotations

import torch
from layer_case import HEADS, KV_HEADS, SCALE, SMALL, Layer, middle, rotated, table

from tokenselect.methods.snapkv import SNAPKV, attention_received

GROUP = HEADS // KV_HEADS


def plain_attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention received by keys [Hkv, T, D] from the last queries [n, Hq, D]."""
    received, length = torch.zeros(keys.shape[1], dtype=torch.float64), keys.shape[1]
    for i, query in enumerate(queries):
        at = length - len(queries) + i
        for head in range(HEADS):
            q = rotated(query[head], at)
            logits = torch.stack([rotated(keys[head // GROUP, j], j) @ q for j in range(at + 1)]) * SCALE
            received[: at + 1] += torch.softmax(logits, dim=0)
    return received


def test_attention_received() -> None:
    queries, keys = torch.randn(5, HEADS, 16), torch.randn(KV_HEADS, 23, 16)
    found = attention_received(queries, keys, table(), SCALE)
    torch.testing.assert_close(found.double(), plain_attention(queries, keys), rtol=1e-3, atol=1e-4)


def plain_kept(layer: Layer, survivors: list[int], start: int, end: int) -> list[int]:
    positions = [*range(4), *survivors, *range(start - 8, end)]
    received = plain_attention(layer.queries[start:end], layer.keys[positions].transpose(0, 1))[4 : 4 + len(survivors)]
    padded = [0.0, 0.0, *received.tolist(), 0.0, 0.0]
    pooled = [sum(padded[i : i + 5]) for i in range(len(survivors))]
    best = sorted(range(len(survivors)), key=lambda i: -pooled[i])[:32]
    return [survivors[i] for i in sorted(best)]


def test_eviction_block_by_block() -> None:
    layer = Layer(SNAPKV)
    survivors = list(range(4, 72))
    for start in (80, 88, 96):
        attended = layer.select((start, start + 8))[0]
        survivors = plain_kept(layer, survivors, start, start + 8)
        assert middle(attended, start) == survivors
        assert len(attended) == 4 + 32 + 8 + 8
        survivors = [*survivors, *range(start - 8, start)]  # what leaves the window before the next block


def test_an_answer_keeps_what_its_prompt_kept() -> None:
    layer = Layer(SNAPKV)
    kept = middle(layer.select((80, 83))[0], 80)
    for start in range(83, 120):
        attended = layer.select((start, start + 1))[0]
        assert attended == [*range(4), *kept, *range(max(72, start + 1 - 16), start + 1)]
        assert len(attended) <= layer.config.budget


def test_few_candidates_are_all_kept() -> None:
    layer = Layer(SNAPKV, SMALL.replace(num_selected_tokens=60))
    assert layer.select((70, 78))[0] == list(range(78))
