"""The cache layer: raw keys that grow in place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tokenselect.cache import Owner, RawKeyLayer

HEADS, DIM = 3, 8


def tokens(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HEADS, count, DIM), torch.randn(batch, HEADS, count, DIM)


def filled(count: int, batch: int = 2) -> tuple[RawKeyLayer, Tensor, Tensor]:
    layer, (keys, values) = RawKeyLayer(Owner()), tokens(count, batch)
    layer.update(keys, values)
    return layer, keys, values


def test_tokens_are_kept_as_they_came() -> None:
    layer = RawKeyLayer(Owner())
    parts = [tokens(count) for count in (5, 1, 1, 300, 2, 700)]
    for keys, values in parts:
        all_keys, all_values = layer.update(keys, values)
    assert torch.equal(all_keys, torch.cat([keys for keys, _ in parts], dim=2))
    assert torch.equal(all_values, torch.cat([values for _, values in parts], dim=2))
    assert torch.equal(layer.keys, all_keys)
    assert torch.equal(layer.values, all_values)
    assert layer.get_seq_length() == 1009
    assert layer.get_mask_sizes(4) == (1013, 0)


def test_a_step_copies_only_its_own_token() -> None:
    layer, places = filled(100)[0], []
    for _ in range(2000):
        keys, values = layer.update(*tokens(1))
        places.append((keys.data_ptr(), values.data_ptr()))
    moves = sum(a != b for a, b in pairwise(places))
    assert moves <= 6  # 256 * 1.5**6 > 2100


def test_tokens_that_are_known_to_come_get_their_place_at_once() -> None:
    layer = RawKeyLayer(Owner(reserve=1500))
    places = {layer.update(*tokens(100))[0].data_ptr() for _ in range(15)}
    assert len(places) == 1


def test_growth_keeps_what_was_there() -> None:
    layer, keys, values = filled(256)
    more = tokens(1)
    all_keys, all_values = layer.update(*more)
    assert torch.equal(all_keys, torch.cat((keys, more[0]), dim=2))
    assert torch.equal(all_values, torch.cat((values, more[1]), dim=2))


def test_keys_and_values_may_differ_in_size() -> None:
    layer = RawKeyLayer(Owner())
    keys, values = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    got = layer.update(keys, values)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


@pytest.mark.parametrize("padding", [[0, 0], [3, 0]], ids=str)
def test_rows_and_pages_find_every_token(padding: list[int]) -> None:
    layer, keys, values = filled(20)
    pages, (key_rows, value_rows) = layer.page_table(padding), layer.rows()
    for sequence, pad in enumerate(padding):
        slots = pages.slots(sequence, torch.arange(20 - pad))
        assert torch.equal(key_rows[slots], keys[sequence, :, pad:].transpose(0, 1))
        assert torch.equal(value_rows[slots], values[sequence, :, pad:].transpose(0, 1))


# -- what generation does to a cache -------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 7, 30, 99])
def test_crop_takes_tokens_back(removed: int) -> None:
    layer, keys, values = filled(30)
    layer.crop(-removed)
    left = max(0, 30 - removed)
    assert layer.get_seq_length() == left
    more = tokens(3)
    layer.update(*more)
    expected = torch.cat((keys[:, :, :left], more[0]), dim=2)
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, torch.cat((values[:, :, :left], more[1]), dim=2))


def test_crop_forgets_selections_but_not_counts() -> None:
    layer = filled(30)[0]
    layer.states[0].query, layer.states[0].hits = torch.ones(1), 4
    layer.crop(0)
    assert layer.states[0].query is not None
    layer.crop(-1)
    assert layer.states[0].query is None
    assert layer.states[0].hits == 4


def test_crop_of_a_positive_count_is_refused() -> None:
    with pytest.raises(ValueError, match="got 5"):
        filled(30)[0].crop(5)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 1], [1], [0, 0, 1], []], ids=str)
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_of_the_batch_move_with_all_that_is_theirs(method: str, rows: list[int]) -> None:
    layer, keys, values = filled(30)
    for i, state in enumerate(layer.states):
        state.hits = i
    getattr(layer, method)(torch.tensor(rows, dtype=torch.int64))
    assert torch.equal(layer.keys, keys[rows])
    assert torch.equal(layer.values, values[rows])
    assert [state.hits for state in layer.states] == rows
    more = tokens(1, len(rows))
    assert torch.equal(layer.update(*more)[0], torch.cat((keys[rows], more[0]), dim=2))


def test_rows_continue_apart_after_reordering() -> None:
    layer = filled(30)[0]
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.states[0].hits = 7
    assert layer.states[1].hits == 0


def test_repeated_rows_stay_together() -> None:
    layer, keys, values = filled(30)
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.keys, keys.repeat_interleave(3, 0))
    assert torch.equal(layer.values, values.repeat_interleave(3, 0))
    assert len(layer.states) == 6


def test_reset_forgets_everything() -> None:
    layer = filled(30)[0]
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.states == []
    keys, values = tokens(4, 5)  # another batch size, too
    assert torch.equal(layer.update(keys, values)[0], keys)


@pytest.mark.parametrize(
    "act",
    [
        lambda layer: layer.crop(-1),
        lambda layer: layer.reorder_cache(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reset(),
    ],
    ids=["crop", "reorder", "repeat", "reset"],
)
def test_an_empty_layer_takes_everything(act: object) -> None:
    layer = RawKeyLayer(Owner())
    act(layer)  # type: ignore[operator]
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    assert layer.values is None
    assert layer.get_max_length() == -1


def test_use_after_leaving_is_refused() -> None:
    layer = filled(3)[0]
    layer.owner.active = False
    with pytest.raises(RuntimeError, match="holds raw keys: use it inside TokenSelect"):
        layer.update(*tokens(1))


def test_it_works_in_transformers_cache() -> None:
    cache, (keys, values) = DynamicCache(), tokens(6)
    cache.layers = [RawKeyLayer(Owner()), RawKeyLayer(Owner())]
    for layer in range(2):
        cache.update(keys, values, layer)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 4
    assert torch.equal(cache.layers[1].keys, keys[[1, 1, 0, 0], :, :4])
    cache.batch_select_indices(torch.tensor([3]))
    cache.reset()
    assert cache.get_seq_length() == 0
