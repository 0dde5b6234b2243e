"""A cache in host memory: the same selections and outputs as one on the device."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import NARROW, SIZES, build
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from tokenselect import memory
from tokenselect.cache import Owner, RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.hardware import empty_pinned
from tokenselect.integrations import transformers as integration
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.offload import OffloadedLayer
from tokenselect.ops import reference
from tokenselect.trace.recorder import Recorder

if TYPE_CHECKING:
    from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Room for 104 rows a sequence: fewer than the prompts have.
CONFIGS = {
    "selecting": NARROW,
    "caching": NARROW.replace(reuse_threshold=0.5),
    "long tail": NARROW.replace(num_tail_tokens=60),
    "whole at first": NARROW.replace(num_dense_tokens=160),
    "sinks and local": NARROW.replace(num_selected_tokens=0),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build(LlamaConfig(**SIZES)).to(DEVICE)


@pytest.fixture(autouse=True)
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the same code runs with the plain definition, once nobody refuses it."""
    if DEVICE.type != "cuda" and "refused" not in request.node.name:
        monkeypatch.setattr(integration, "check_offload", lambda *args: None)


def prompt(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(length + seed)
    return (torch.randperm(510, generator=generator)[:length] + 2)[None].to(DEVICE)


def generate(model: PreTrainedModel, ids: Tensor, steps: int = 16, **kwargs: Any) -> list[list[int]]:
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, **kwargs}
    tokens: list[list[int]] = model.generate(ids, max_new_tokens=steps, **kwargs)[:, ids.shape[1] :].tolist()
    return tokens


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def both(config: TokenSelectConfig) -> tuple[TokenSelectConfig, TokenSelectConfig]:
    return config, config.replace(kv_offload=True)


# -- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [5, 150, 240])
def test_tokens_are_those_of_a_cache_on_the_device(model: PreTrainedModel, name: str, length: int) -> None:
    found = []
    for config in both(CONFIGS[name]):
        with TokenSelect(model, config):
            found.append((generate(model, prompt(length), 24), logits(model, prompt(length))))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)


def test_selections_are_the_same(model: PreTrainedModel) -> None:
    cells = []
    for config in both(NARROW):
        recorder = Recorder(trained_window=256)
        with TokenSelect(model, config, recorder=recorder):
            recorder.begin(170)
            generate(model, prompt(180))
        cells.append(recorder.cells)
    assert cells[0].keys() == cells[1].keys()
    for position, layers in cells[0].items():
        for index, cell in layers.items():
            other = cells[1][position][index]
            assert cell.indices.tolist() == other.indices.tolist()
            assert cell.mass == pytest.approx(other.mass, abs=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_padded_batch(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    prompts = [prompt(length, length) for length in (190, 130, 9)]
    ids = torch.cat([torch.nn.functional.pad(part, (190 - part.shape[1], 0)) for part in prompts])
    found = []
    for config in both(NARROW):
        with TokenSelect(model, config):
            found.append(generate(model, ids, attention_mask=(ids != 0).long(), **kwargs))
    assert found[0] == found[1]


def test_tokens_taken_back_are_forgotten(model: PreTrainedModel) -> None:
    ids, other = prompt(140), prompt(30, 7)
    with TokenSelect(model, NARROW.replace(kv_offload=True)):
        cache, plain = DynamicCache(), DynamicCache()
        logits(model, ids, past_key_values=cache)
        for token in prompt(30, 3).split(1, dim=1):
            logits(model, token, past_key_values=cache)
        cache.crop(-30)
        logits(model, ids, past_key_values=plain)
        for token in other.split(1, dim=1):
            ours, expected = (logits(model, token, past_key_values=each) for each in (cache, plain))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_second_turn(model: PreTrainedModel) -> None:
    found = []
    for config in both(NARROW):
        cache = DynamicCache()
        with TokenSelect(model, config):
            first = generate(model, prompt(120), past_key_values=cache)
            long = torch.cat((prompt(120), torch.tensor(first, device=DEVICE), prompt(70, 1)), dim=1)
            found.append((first, generate(model, long, past_key_values=cache)))
    assert found[0] == found[1]


def test_the_device_holds_few_rows(model: PreTrainedModel) -> None:
    cache, config = DynamicCache(), NARROW.replace(kv_offload=True)
    with TokenSelect(model, config):
        logits(model, prompt(240), past_key_values=cache)
        layer = cache.layers[0]
        assert isinstance(layer, OffloadedLayer)
        assert layer.keys.device.type == "cpu"
        rows, _, _ = layer.attended_rows(torch.zeros(1, dtype=torch.int64, device=DEVICE))
        assert rows.device.type == DEVICE.type
        assert rows.shape[0] == config.num_resident_tokens == 104


# -- one layer -------------------------------------------------------------------------------------------------


def states(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    keys, values = (torch.randn(batch, 3, count, 8, device=DEVICE) for _ in range(2))
    return keys, values


def check(layer: OffloadedLayer, plain: RawKeyLayer, padding: list[int]) -> None:
    """Rows of both layers are the same ones, wherever they are kept."""
    length = plain.get_seq_length()
    for sequence, pad in enumerate(padding):
        positions = torch.randperm(length - pad, device=DEVICE)[: layer.num_resident]
        keys, values, rows = layer.attended_rows(layer.page_table(padding).slots(sequence, positions))
        slots = plain.page_table(padding).slots(sequence, positions)
        for made, expected in zip((keys, values), plain.rows(), strict=True):
            assert torch.equal(made[rows], expected[slots])


def ops() -> Any:
    from tokenselect.ops import gpu

    return gpu if DEVICE.type == "cuda" else reference


def test_a_layer_keeps_right_through_all_that_happens() -> None:
    layer, plain = OffloadedLayer(Owner(), 0, ops(), 20), RawKeyLayer(Owner())
    actions = [
        lambda each, new: each.update(*new),
        lambda each, new: each.crop(-3),
        lambda each, new: each.update(*new),
        lambda each, new: each.reorder_cache(torch.tensor([1, 1], device=DEVICE)),
        lambda each, new: each.reorder_cache(torch.tensor([1, 0], device=DEVICE)),
        lambda each, new: each.batch_repeat_interleave(2),
        lambda each, new: each.batch_select_indices(torch.tensor([3, 0], device=DEVICE)),
        lambda each, new: each.update(*new),  # grows
    ]
    for act, count in zip(actions, (40, 0, 1, 0, 0, 0, 0, 400), strict=True):
        new = states(max(1, count))
        for each in (layer, plain):
            act(each, new)
        batch = len(plain.states)
        for padding in ([0] * batch, [0, 5] * (batch // 2)):
            check(layer, plain, padding)
            check(layer, plain, padding)
        assert torch.equal(layer.keys, plain.keys.cpu())
        assert torch.equal(layer.values, plain.values.cpu())


def test_the_int8_copy_is_that_of_a_layer_on_the_device() -> None:
    made = []
    for late in (False, True):
        torch.manual_seed(2)
        owner = Owner(quantize=ops().quantize_rows, center_tokens=6)
        for each in (RawKeyLayer(owner), OffloadedLayer(owner, 0, ops(), 20)):
            torch.manual_seed(3)
            for count in (30, 1, 1, 12):
                each.update(*states(count))
                if not late:
                    each.scoring_rows([0, 2])
            keys, scales, center = each.scoring_rows([0, 2])
            slots = each.page_table([0, 2]).slots(1, torch.arange(42, device=DEVICE))
            made.append((keys[slots].cpu(), scales[slots].cpu(), center.cpu()))
    for other in made[1:]:
        for part, expected in zip(other, made[0], strict=True):
            assert torch.equal(part, expected)


# -- memory, and what is refused ---------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no pinned memory without a GPU")
def test_pinned_memory_takes_what_it_needs_and_is_given_back() -> None:
    tensor = empty_pinned((3, 1000, 7), torch.bfloat16)
    assert tensor.is_pinned()
    tensor.fill_(2)
    view = tensor[1]
    del tensor
    gc.collect()
    assert view.is_pinned()
    assert float(view.float().mean()) == 2


def test_what_a_context_takes_on_the_device() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    settings = TokenSelectConfig(num_dense_tokens=900, kv_offload=True)
    resident = memory.kv_bytes(config, settings.num_resident_tokens, torch.bfloat16)
    copy = 3 * 100_000 * 2 * (16 + 4)
    assert memory.context_bytes(config, 100_000, torch.bfloat16, settings) == resident + copy


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_not_enough_memory_on_either_side(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**7 if device.type == place else 10**12)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    settings = TokenSelectConfig(kv_offload=True)
    with pytest.raises(ValueError, match="would fit"):
        memory.check_memory(config, 10**6, torch.bfloat16, torch.device("cuda"), settings)


def test_another_copy_than_int8_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^score_dtype must be 'int8' when kv_offload is set, got 'same'$"):
        TokenSelectConfig(kv_offload=True, score_dtype="same")


def test_a_model_on_the_cpu_is_refused(model: PreTrainedModel) -> None:
    try:
        with pytest.raises(ValueError, match=r"^kv_offload needs a model on a GPU, got one on cpu: move it there"):
            TokenSelect(model.cpu(), NARROW.replace(kv_offload=True))
    finally:
        model.to(DEVICE)
