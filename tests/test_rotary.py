"""Our rotations are the host's own, whatever its scaling, layout and partial rotation."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tokenselect.ops.reference import rotate
from tokenselect.rotary import HostRotary, RotaryTable, mean_rotation

TOLERANCE = 1e-5  # absolute, float32, of vectors of size 1
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
LONG_FACTORS = {"short_factor": [1.0 + i / 9 for i in range(16)], "long_factor": [1.0 + i for i in range(16)]}


def parameters(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **more}}


@dataclass(frozen=True)
class Rotary:
    """A host's rotary module, and the function with which its attention applies it."""

    name: str
    family: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    layer_type: str | None = None

    @property
    def source(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def module(self) -> nn.Module:
        config = getattr(transformers, f"{self.kind}Config")(**{**SIZES, **self.settings})
        return getattr(self.source, f"{self.kind.removesuffix('Text')}RotaryEmbedding")(config)

    def apply(self, module: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        """What the host's attention makes of queries [1, H, T, D]."""
        extra = {"layer_type": self.layer_type} if self.layer_type else {}
        cos, sin = module(x, positions[None], **extra)
        return self.source.apply_rotary_pos_emb(x, x, cos, sin)[0]


LLAMA3 = parameters(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
LONGROPE = parameters("longrope", factor=8.0, original_max_position_embeddings=64, **LONG_FACTORS)
FULL = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
HOSTS = [
    Rotary("default", "llama", "Llama"),
    Rotary("linear", "llama", "Llama", parameters("linear", factor=4.0)),
    Rotary("dynamic", "llama", "Llama", parameters("dynamic", factor=4.0)),
    Rotary("yarn", "llama", "Llama", parameters("yarn", factor=8.0, original_max_position_embeddings=64)),
    Rotary("llama3", "llama", "Llama", LLAMA3),
    Rotary("longrope", "llama", "Llama", LONGROPE),
    Rotary("partial", "gpt_neox", "GPTNeoX", {"rotary_pct": 0.25}),
    Rotary("partial-odd", "phi3", "Phi3", parameters("default", partial_rotary_factor=0.75)),
    Rotary("interleaved", "cohere", "Cohere"),
    Rotary("interleaved-partial", "glm", "Glm", parameters("default", partial_rotary_factor=0.5)),
    Rotary("half-size-tables", "gpt_oss", "GptOss"),
    Rotary("per-layer-type", "gemma3", "Gemma3Text", FULL, "full_attention"),
]


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request: pytest.FixtureRequest) -> Rotary:
    return request.param


def learned(host: Rotary, module: nn.Module, max_length: int = 512) -> HostRotary:
    rotary = HostRotary(module, max_length, host.layer_type)
    raw = torch.randn(1, 2, 8, 32)
    rotary.learn_layout(raw, host.apply(module, raw, torch.arange(8)))
    return rotary


def rotated(table: RotaryTable, x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, *table.rotation(positions, torch.float32), table.interleaved)


@pytest.mark.parametrize("length", [8, 64, 65, 200, 511])
def test_our_rotation_is_the_hosts(host: Rotary, length: int) -> None:
    module = host.module()
    table = learned(host, module).table(length)
    x = torch.randn(1, 2, length, 32)
    expected = host.apply(module, x, torch.arange(length))
    torch.testing.assert_close(rotated(table, x, torch.arange(length)), expected, atol=TOLERANCE * 10, rtol=0)


def test_tables_hold_one_angle_per_pair_and_no_factor(host: Rotary) -> None:
    table = learned(host, host.module()).table(100)
    torch.testing.assert_close(table.cos**2 + table.sin**2, torch.ones_like(table.cos), atol=TOLERANCE, rtol=0)
    assert table.interleaved == host.name.startswith("interleaved")
    assert 2 * table.cos.shape[-1] <= 32


def test_identity_leaves_the_hosts_queries_raw(host: Rotary) -> None:
    cos, sin = learned(host, host.module()).identity(torch.float32)
    x = torch.randn(1, 2, 9, 32)
    assert torch.equal(host.source.apply_rotary_pos_emb(x, x, cos, sin)[0], x)


def test_the_hosts_module_is_not_touched(host: Rotary) -> None:
    module = host.module()
    before = {name: part.clone() for name, part in module.named_buffers(remove_duplicate=False)}
    learned(host, module).table(511)
    assert before.keys() == dict(module.named_buffers(remove_duplicate=False)).keys()
    assert all(torch.equal(part, before[name]) for name, part in module.named_buffers(remove_duplicate=False))


def test_a_module_that_has_seen_long_inputs_gives_the_same_tables(host: Rotary) -> None:
    fresh, used = host.module(), host.module()
    host.apply(used, torch.randn(1, 2, 5, 32), torch.arange(900, 905))
    for length in (30, 400):
        ours, expected = (learned(host, module).table(length) for module in (used, fresh))
        assert torch.equal(ours.cos, expected.cos)


@pytest.mark.parametrize(("factor", "expected"), [("yarn", True), ("longrope", True), ("linear", False)])
def test_the_attention_factor_is_found(factor: str, expected: bool) -> None:
    host = next(item for item in HOSTS if item.name == factor)
    module = host.module()
    table = learned(host, module).table(100)
    assert table.attention_factor == pytest.approx(module.attention_scaling)
    assert (table.attention_factor > 1.05) is expected


# -- longrope ------------------------------------------------------------------------------------------------


def test_longrope_changes_tables_beyond_the_original_window() -> None:
    rotary = learned(HOSTS[5], HOSTS[5].module())
    short, long = rotary.table(64), rotary.table(65)
    assert rotary.table(3) is short
    assert rotary.table(500) is long
    assert (len(short), len(long)) == (64, 512)
    factors = [torch.tensor(LONG_FACTORS[name]) for name in ("short_factor", "long_factor")]
    unscaled = [item.frequencies * factor for item, factor in zip((short, long), factors, strict=True)]
    torch.testing.assert_close(*unscaled, atol=1e-6, rtol=0)


def test_longrope_keeps_the_short_table_when_the_budget_fits() -> None:
    rotary = learned(HOSTS[5], HOSTS[5].module(), max_length=40)
    assert len(rotary.table(40)) == 40
    assert rotary.table(40) is rotary.table(1)


@pytest.mark.parametrize("name", ["default", "dynamic", "yarn"])
def test_other_kinds_have_one_table(name: str) -> None:
    host = next(item for item in HOSTS if item.name == name)
    rotary = learned(host, host.module())
    assert rotary.table(1) is rotary.table(512)


# -- layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x.flip(-1), lambda x: torch.zeros_like(x), lambda x: -x],
    ids=["mirrored", "zero", "negated"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_unknown_layout_is_refused(wrong: Any, dtype: torch.dtype) -> None:
    module, raw = HOSTS[0].module(), torch.randn(1, 2, 8, 32).to(dtype)
    with pytest.raises(NotImplementedError, match="neither the half nor the interleaved layout"):
        HostRotary(module, 64).learn_layout(raw, wrong(HOSTS[0].apply(module, raw, torch.arange(8))))


def test_layers_of_different_layouts_are_refused() -> None:
    module = HOSTS[0].module()
    rotary = learned(HOSTS[0], module)
    raw = torch.randn(1, 2, 8, 32)
    cos, sin = (part[0, :, :16] for part in module(raw, torch.arange(8)[None]))
    with pytest.raises(NotImplementedError, match="layout"):
        rotary.learn_layout(raw, rotate(raw, cos, sin, interleaved=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_layouts_are_learned_in_half_precision(host: Rotary, dtype: torch.dtype) -> None:
    module = host.module()
    raw = torch.randn(1, 2, 8, 32).to(dtype)
    rotary = HostRotary(module, 64, host.layer_type)
    rotary.learn_layout(raw, host.apply(module, raw, torch.arange(8)).to(dtype))
    assert rotary.table(64).interleaved == host.name.startswith("interleaved")


def test_a_table_before_its_layout_is_refused() -> None:
    with pytest.raises(RuntimeError, match="learn_layout"):
        HostRotary(HOSTS[0].module(), 64).table(3)


# -- mean rotations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_mean_rotation_is_the_average_of_single_ones(host: Rotary, size: int) -> None:
    frequencies = learned(host, host.module()).table(512).frequencies
    nearest = torch.tensor([0, 1, 63, 1000])
    cos, sin = mean_rotation(frequencies, nearest, size, 10**6)
    angle = (nearest[:, None] + torch.arange(size)).double()[:, :, None] * frequencies
    torch.testing.assert_close(cos.double(), angle.cos().mean(1), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin().mean(1), atol=TOLERANCE, rtol=0)


def test_a_mean_rotation_of_no_frequency_is_none() -> None:
    cos, sin = mean_rotation(torch.zeros(3), torch.tensor([5]), 64, 100)
    assert torch.equal(cos, torch.ones(1, 3))
    assert torch.equal(sin, torch.zeros(1, 3))


def test_the_middle_of_far_buckets_is_clipped() -> None:
    frequencies = torch.tensor([0.5, 0.01])
    near, *far = zip(*mean_rotation(frequencies, torch.tensor([20, 97, 500, 10**6]), 8, 100), strict=True)
    middle = 100 * frequencies.double()
    for cos, sin in far:  # the middle of 97 .. 104 is beyond 100 already
        turned = torch.atan2(sin, cos).double()
        torch.testing.assert_close(turned, torch.atan2(middle.sin(), middle.cos()), atol=1e-6, rtol=0)
        assert torch.equal(cos, far[0][0])
    assert not torch.equal(near[0], far[0][0])
