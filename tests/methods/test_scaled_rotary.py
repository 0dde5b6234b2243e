"""NTK and YaRN are what Transformers computes when a model's config asks for them."""

from __future__ import annotations

import pytest
import torch
from scheme_case import logits_of, tiny_llama

from tokenselect.config import TokenSelectConfig
from tokenselect.methods import attach
from tokenselect.methods.reach import Reach, doubled

CONFIG, WINDOW = TokenSelectConfig(), 512


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_within_the_window_nothing_changes(method: str) -> None:
    model, ids = tiny_llama(WINDOW), torch.randint(64, (1, 300))
    dense = logits_of(model, ids)
    with attach(model, method, CONFIG):
        assert torch.equal(logits_of(model, ids), dense)


@pytest.mark.parametrize(("length", "factor"), [(500, 2), (800, 2), (1000, 4)])  # 128 tokens are left for the answer
def test_yarn_is_that_of_transformers(length: int, factor: int) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": float(factor)}
    rope["original_max_position_embeddings"] = WINDOW
    ids = torch.randint(64, (1, length))
    expected = logits_of(tiny_llama(WINDOW, rope_parameters=rope), ids)
    model = tiny_llama(WINDOW)
    with attach(model, "yarn", CONFIG):
        torch.testing.assert_close(logits_of(model, ids), expected)
    assert not torch.allclose(logits_of(model, ids), expected, atol=1e-2)


def test_ntk_is_a_larger_base() -> None:
    ids, dim = torch.randint(64, (1, 800)), 8
    rope = {"rope_type": "default", "rope_theta": 10000.0 * 2 ** (dim / (dim - 2))}
    expected = logits_of(tiny_llama(WINDOW, rope_parameters=rope), ids)
    model = tiny_llama(WINDOW)
    with attach(model, "ntk", CONFIG):
        torch.testing.assert_close(logits_of(model, ids), expected)


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_an_answer_keeps_the_scale_of_its_prompt(method: str) -> None:
    model, ids = tiny_llama(WINDOW), torch.randint(64, (1, 700))
    with attach(model, method, CONFIG):
        torch.testing.assert_close(logits_of(model, ids, steps=4), logits_of(model, ids), rtol=1e-4, atol=1e-5)


def test_the_reach_of_a_sequence() -> None:
    assert [doubled(n, 100) for n in (1, 100, 101, 200, 201, 800)] == [100, 100, 200, 200, 400, 800]
    reach = Reach(1000)
    assert reach.update(torch.arange(800)[None]) == 1000
    assert reach.update(torch.tensor([[999]])) == 1000
    assert reach.update(torch.tensor([[1000]])) == 2000
    assert reach.update(torch.arange(1500)[None]) == 2000
    assert reach.update(torch.arange(1900)[None]) == 4000
    assert reach.update(torch.tensor([[1950]])) == 4000  # as its prompt
    assert reach.update(torch.arange(1200, 1300)[None]) == 4000  # a later turn
    assert reach.update(torch.arange(10)[None]) == 1000


def test_a_scaled_model_is_refused() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(NotImplementedError, match=r"scaled already \(linear\)"):
        attach(tiny_llama(WINDOW, rope_parameters=rope), "yarn", CONFIG)
