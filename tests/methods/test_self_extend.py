"""Far tokens share positions; near ones stand where they are."""

from __future__ import annotations

import pytest
import torch
from layer_case import HEADS, KV_HEADS, SCALE, rotated, table
from scheme_case import logits_of, tiny_llama

from tokenselect.config import TokenSelectConfig
from tokenselect.methods import attach
from tokenselect.methods.self_extend import group_size, self_extend_attention

GROUP = HEADS // KV_HEADS


def plain(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, size: int, neighbours: int) -> torch.Tensor:
    """Every pair of tokens by itself."""
    out, length, count = torch.zeros(queries.shape), keys.shape[1], queries.shape[1]
    for head in range(HEADS):
        for row in range(count):
            i, logits = length - count + row, []
            for j in range(i + 1):
                distance = i - j if i - j < neighbours else i // size + neighbours - neighbours // size - j // size
                logits.append(rotated(queries[head, row], distance) @ keys[head // GROUP, j].double() * SCALE)
            out[head, row] = torch.softmax(torch.stack(logits), dim=0).float() @ values[head // GROUP, : i + 1]
    return out


@pytest.mark.parametrize(("length", "count"), [(40, 40), (40, 7), (40, 1), (6, 6)])
@pytest.mark.parametrize(("size", "neighbours"), [(1, 8), (3, 8), (4, 1), (2, 100)])
def test_attention_of_every_pair(
    length: int, count: int, size: int, neighbours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenselect.methods.self_extend._QUERIES_AT_ONCE", 16)
    queries = torch.randn(HEADS, count, 16)
    keys, values = torch.randn(KV_HEADS, length, 16), torch.randn(KV_HEADS, length, 16)
    found = self_extend_attention(queries, keys, values, table(), size, neighbours, SCALE)
    torch.testing.assert_close(found, plain(queries, keys, values, size, neighbours), rtol=1e-3, atol=1e-3)


def test_the_group_size_keeps_two_thirds_of_the_window() -> None:
    assert group_size(8192, 8192, 1024) == 1
    for length in (8193, 16384, 32768, 65536):
        size = group_size(length, 8192, 1024)
        assert 1024 + (length - 1024) / size <= 8192 * 2 / 3 < 1024 + (length - 1024) / (size - 1)


def test_within_the_window_it_is_dense_attention() -> None:
    model, ids = tiny_llama(512), torch.randint(64, (1, 300))
    dense = logits_of(model, ids)
    with attach(model, "self_extend", TokenSelectConfig()):
        found = logits_of(model, ids)
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)


def test_steps_continue_the_prompt() -> None:
    model, ids = tiny_llama(64), torch.randint(64, (1, 200))
    with attach(model, "self_extend", TokenSelectConfig()):
        torch.testing.assert_close(logits_of(model, ids, steps=5), logits_of(model, ids), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(logits_of(model, ids), logits_of(model, ids[:, 150:])[:, -1:], atol=1e-2)


def test_padding_is_refused() -> None:
    model, ids = tiny_llama(64), torch.randint(64, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with (
        attach(model, "self_extend", TokenSelectConfig()),
        pytest.raises(NotImplementedError, match="no padded batches"),
    ):
        model(ids, attention_mask=mask)
