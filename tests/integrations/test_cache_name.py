"""Transformers has renamed its cache: users may call it by either name, and a third one is no riddle."""

from __future__ import annotations

import pytest
import torch
from small import NARROW, SIZES, build
from transformers import DynamicCache, LlamaConfig

from tokenselect.integrations.cache_name import CACHE, cache_in, handed_cache
from tokenselect.integrations.transformers import TokenSelect


def test_a_cache_goes_by_its_old_and_its_new_name() -> None:
    model = build(LlamaConfig(**SIZES))
    ids, made = torch.arange(60)[None], []
    with TokenSelect(model, NARROW), torch.no_grad():
        for name in ("past_key_values", CACHE):
            cache = DynamicCache(config=model.config)
            model(ids[:, :59], **{name: cache})
            assert cache.get_seq_length() == 59
            made.append(model(ids[:, 59:], **{name: cache}).logits)
    assert torch.equal(*made)


def test_a_name_that_is_given_without_a_cache_hides_none() -> None:
    model = build(LlamaConfig(**SIZES))
    cache = DynamicCache(config=model.config)
    with TokenSelect(model, NARROW), torch.no_grad():
        model.model(torch.arange(60)[None], cache=None, past_key_values=cache)
    assert cache.get_seq_length() == 60


def test_a_cache_by_an_unknown_name_is_told() -> None:
    assert cache_in({"cache": None, "past_key_values": 3}) == 3
    assert cache_in({"memory": 3}) is None
    with pytest.raises(NotImplementedError, match="hands its layers no cache by a known name"):
        handed_cache({"memory": 3})
