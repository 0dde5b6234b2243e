"""What a decode step computes besides attention, for a few rows: linear layers, norms, int8 copies of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import angles, contiguous, sequences_of, shapes, votes_case
from torch import Tensor

from tokenselect.ops import cpu, reference

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=f"native kernels: {cpu.why_missing()}")

SETS = [] if cpu.why_missing() else cpu.instruction_sets()
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative to outputs of size 1


@pytest.fixture(params=SETS, autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    cpu.use_instruction_set(request.param)
    yield
    cpu.use_instruction_set("auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(("inside", "outside"), [(16, 5), (48, 191), (576, 64), (1536, 1)])
def test_linear(rows: int, inside: int, outside: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, inside).to(dtype), (torch.randn(outside, inside) * inside**-0.5).to(dtype)
    bias = torch.randn(outside).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    made = cpu.linear(x, weight, bias)
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    torch.testing.assert_close(cpu.linear(x[None], weight)[0].double(), expected - bias.double(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
def test_layers_of_one_input_are_those_alone(dtype: torch.dtype) -> None:
    x, bias, none = torch.randn(2, 48).to(dtype), torch.randn(70).to(dtype), torch.empty(0, dtype=dtype)
    weights = [torch.randn(size, 48).to(dtype) for size in (70, 1, 129)]
    biases = [bias, none, none]
    alone = [torch.ops.tokenselect.linear(x, *part) for part in zip(weights, biases, strict=True)]
    both = torch.ops.tokenselect.linear2(x, weights[0], bias, weights[1], none)
    three = torch.ops.tokenselect.linear3(x, weights[0], bias, weights[1], none, weights[2], none)
    assert all(map(torch.equal, both, alone))
    assert all(map(torch.equal, three, alone))


def test_linear_does_not_depend_on_the_number_of_threads() -> None:
    x, weight, before = torch.randn(1, 576), torch.randn(5000, 576), torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(cpu.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_takes_linear_refuses_what_the_kernel_cannot_read() -> None:
    assert cpu.takes_linear(torch.empty(3, 32))
    assert not cpu.takes_linear(torch.empty(3, 20))
    assert not cpu.takes_linear(torch.empty(32, 3).T)
    assert not cpu.takes_linear(torch.empty(3, 32, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
@pytest.mark.parametrize("size", [16, 80, 576])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, size).to(dtype), torch.rand(size).to(dtype)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    torch.testing.assert_close(
        cpu.rms_norm(x, weight, 1e-5), expected, atol=1e-6, rtol=1e-2 if dtype.itemsize == 2 else 1e-5
    )


# -- int8 copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize("centered", [False, True])
def test_quantize_rows(dim: int, dtype: torch.dtype, centered: bool) -> None:
    rows = torch.randn(3, 700, dim).to(dtype).transpose(0, 1)  # strided
    rows[5] = 0
    center = torch.randn(3, dim) if centered else None
    integers, scales = cpu.quantize_rows(rows, center)
    expected, expected_scales = reference.quantize_rows(rows, center)
    torch.testing.assert_close(scales, expected_scales, atol=0, rtol=1e-6)
    different = integers != expected  # where a quotient lies next to a half, the last bit of it decides
    assert different.float().mean() < 1e-3
    assert (integers.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_a_copy_is_written_where_it_belongs(ops: Any) -> None:
    """Into rows of a larger one, whose heads lie apart; nothing beside them changes."""
    rows, center = torch.randn(9, 3, 32), torch.randn(3, 32)
    integers, scales = torch.full((3, 20, 32), 77, dtype=torch.int8), torch.full((3, 20), 7.0)
    into = integers[:, 5:14].transpose(0, 1), scales[:, 5:14].T
    given = ops.quantize_rows(rows, center, into)
    expected = ops.quantize_rows(rows, center)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(into, expected, given, strict=True))
    untouched = [*range(5), *range(14, 20)]
    assert bool((integers[:, untouched] == 77).all() & (scales[:, untouched] == 7).all())


def test_the_reference_copy_is_near_the_keys() -> None:
    rows, center = torch.randn(40, 2, 16) + 9, torch.full((2, 16), 9.0)
    integers, scales = reference.quantize_rows(rows, center)
    assert integers.abs().max() <= 127
    assert ((integers * scales[..., None] + center) - rows).abs().max() <= scales.max() / 2 + 1e-6


@pytest.mark.parametrize("layout", ["page1", "page16", "padded"])
@pytest.mark.parametrize("dim", [16, 64, 80, 112, 256])
@pytest.mark.parametrize("scoring", ["mix", "position_free", "distance"])
def test_votes_by_a_centered_copy(layout: str, dim: int, scoring: str) -> None:
    case = votes_case(layout, dim=dim, scoring=scoring, context=True)
    case.cache.keys.nan_to_num_(3.0)
    center = torch.randn(2, 2, dim)  # one for each sequence, whatever it is
    scale = 1 / 200
    integers = torch.randint(-127, 128, case.cache.keys.shape, dtype=torch.int8)
    scales = torch.rand(integers.shape[:2]).T.contiguous().T * scale  # strided, as the cache's
    given = (case.queries, integers, case.cache.pages, case.of, case.candidates, case.views, 0.1, case.context)
    ours, theirs = (ops.score_tokens(*given, scales, center)[0] for ops in (cpu, reference))
    queries_of_8_bits = cpu.instruction_set() in ("avx512", "avx512_bf16", "amx")
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=8e-2 if queries_of_8_bits else 0)


def test_the_center_counts() -> None:
    """A shift of all keys shifts all logits of one view alike, but not those of runs at different distances."""
    case = votes_case("page16", scoring="distance")
    case.cache.keys.nan_to_num_(0.0)
    integers, scales = reference.quantize_rows(case.cache.keys)
    given = (case.queries, integers, case.cache.pages, case.of, case.candidates, case.views, 0.3, None, scales)
    center = 3 * torch.randn(2, 2, 16)
    for ops in (cpu, reference):
        assert (ops.score_tokens(*given, center)[0] - ops.score_tokens(*given)[0]).abs().max() > 1e-2


def keys_with_large_channels(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys = torch.randn(4000, 3, 64) + 20 * torch.randn(3, 64).relu()
    return keys.to(dtype), keys[:1024].mean(0)


def test_a_centered_copy_finds_the_exact_choice() -> None:
    """What the default stands on: where some channels are large in every token, counting from their mean saves bits."""
    keys, center = keys_with_large_channels(torch.float32)
    cache = contiguous([(keys, keys)], padded=False)
    case = votes_case("page16", heads=(9, 3), dim=64, scoring="position_free", half=32)
    cos, sin = angles(1, 32)
    view = type(case.views[0])(cos, sin, 1, torch.tensor([0, 1]))
    shared = (cache.pages, torch.tensor([0]), torch.tensor([[0, 4000]]), [view], 0.125, None)
    query = sequences_of([1], 9, 64, torch.float32)[0][0]

    def chosen(rows: Tensor, *copy: Tensor) -> set[int]:
        votes, start_loc = cpu.score_tokens(query, rows, *shared, *copy)
        return set(cpu.topk_tokens(votes, start_loc, 512)[0].tolist())

    exact = chosen(keys)
    plain = chosen(*reference.quantize_rows(keys))
    centered = chosen(*reference.quantize_rows(keys, center), center[None])
    assert len(centered & exact) / 512 > 0.98
    assert len(centered & exact) > len(plain & exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5])
def test_pool_queries(half: int, interleaved: bool, dtype: torch.dtype) -> None:
    queries, starts, counts = torch.randn(40, 6, 16).to(dtype), torch.tensor([0, 7, 8, 39]), torch.tensor([7, 1, 31, 1])
    given = (queries, starts, counts, *angles(31, half), interleaved)
    torch.testing.assert_close(cpu.pool_queries(*given), reference.pool_queries(*given), atol=1e-6, rtol=1e-5)
