"""What a paged cache needs beside attention: new tokens written, chosen ones found, and the int8 copy of some rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import LAYOUTS, sequences_of, shapes, sparse_case

from tokenselect.ops import cpu, reference
from tokenselect.ops.paging import PageTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(cpu.why_missing() is not None, reason=f"native kernels: {cpu.why_missing()}")
backends = pytest.mark.parametrize("ops", [reference, pytest.param(cpu, marks=needs_kernels)])


def cache_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values side by side, as vLLM keeps them."""
    both = torch.zeros(20, 3, 32, dtype=dtype)
    return both[..., :16], both[..., 16:]


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
def test_new_tokens_go_to_their_rows(ops: Any, dtype: torch.dtype) -> None:
    made = torch.randn(6, 3, 48).to(dtype)  # the last row is padding beyond the slots
    keys, values = made[..., :16], made[..., 32:]
    key_rows, value_rows = cache_rows(dtype)
    ops.write_rows(keys, values, torch.tensor([7, 0, -1, 19, 3]), key_rows, value_rows)
    for token, row in ((0, 7), (1, 0), (3, 19), (4, 3)):
        assert torch.equal(key_rows[row], keys[token])
        assert torch.equal(value_rows[row], values[token])
    untouched = [row for row in range(20) if row not in (7, 0, 19, 3)]
    assert not key_rows[untouched].any()
    assert not value_rows[untouched].any()


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chosen_tokens_are_found_in_their_pages(ops: Any, layout: str) -> None:
    pages = LAYOUTS[layout](sequences_of([41, 60], 2, 16, torch.float32)).pages
    chosen, sequences = torch.tensor([[0, 7, 40], [1, 2, 59], [30, 31, 33]]), torch.tensor([0, 1, 1])
    slots = torch.full((14,), -5)
    ops.fill_slots(chosen, sequences, pages, torch.tensor([1, 11, 5]), slots)
    expected = torch.full((14,), -5)
    for place, sequence, positions in ((1, 0, chosen[0]), (11, 1, chosen[1]), (5, 1, chosen[2])):
        expected[place : place + 3] = pages.slots(sequence, positions)
    assert torch.equal(slots, expected)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranges_of_positions_are_found_in_their_pages(ops: Any, layout: str) -> None:
    pages = LAYOUTS[layout](sequences_of([41, 60], 2, 16, torch.float32)).pages
    ranges = [(1, 0, 4), (-1, 0, 3), (1, 17, 60), (0, 0, 41), (0, 40, 40), (0, 40, 41)]
    expected = [torch.zeros(3) if s < 0 else pages.slots(s, torch.arange(a, b)) for s, a, b in ranges]
    slots = ops.range_slots(ranges, pages)
    assert slots.dtype == torch.int64
    assert torch.equal(slots, torch.cat(expected).long())
    assert ops.range_slots([], pages).shape == (0,)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=shapes)
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_the_copy_of_some_rows(dim: int, dtype: torch.dtype) -> None:
    rows, centers = torch.randn(3, 700, dim).to(dtype).transpose(0, 1), torch.randn(4, 3, dim)
    tokens, owners, into = torch.randperm(700)[:600], torch.randint(4, (600,)), torch.randperm(900)[:600]
    copies = []
    for ops in (cpu, reference):
        integers, scales = torch.zeros(3, 900, dim, dtype=torch.int8).transpose(0, 1), torch.zeros(3, 900).T
        ops.quantize_into(rows, tokens, centers, owners, integers, scales, into)
        copies.append((integers, scales))
    (integers, scales), (expected, expected_scales) = copies
    assert (expected_scales != 0).sum() == 3 * 600
    torch.testing.assert_close(scales, expected_scales, atol=0, rtol=1e-6)
    different = integers != expected  # where a quotient lies next to a half, the last bit of it decides
    assert different.float().mean() < 1e-3
    assert (integers.int() - expected.int()).abs().max() <= 1


@backends
def test_attention_into_a_given_tensor(ops: Any) -> None:
    case = sparse_case()
    case.queries = torch.cat((case.queries, torch.randn(3, 6, 16)))  # padding: of no block
    case.cache.values.nan_to_num_(0.0)
    expected = case.run(ops)
    out = torch.full_like(case.queries, float("nan"))
    case.options["out"] = out
    assert case.run(ops) is out
    assert torch.equal(out, expected)
    assert not out[22:].any()


def write(slots: list[int], **given: Any) -> None:
    key_rows, value_rows = cache_rows(torch.float32)
    arguments = {"keys": torch.rand(3, 3, 16), "values": torch.rand(3, 3, 16)}
    arguments |= {"key_rows": key_rows, "value_rows": value_rows} | given
    cpu.write_rows(slots=torch.tensor(slots), **arguments)


def fill(**given: Any) -> None:
    arguments = {
        "chosen": torch.tensor([[0, 5]]),
        "sequences": torch.tensor([0]),
        "pages": PageTable(torch.tensor([[4, 2]]), 3, [0]),
        "places": torch.tensor([2]),
        "slots": torch.zeros(4, dtype=torch.int64),
    }
    cpu.fill_slots(**arguments | given)


def ranges(*given: tuple[int, int, int]) -> None:
    cpu.range_slots(given, PageTable(torch.tensor([[4, 2]]), 3, [0]))


def quantize(**given: Any) -> None:
    arguments = {
        "rows": torch.rand(5, 2, 16),
        "tokens": torch.tensor([4]),
        "centers": torch.rand(2, 2, 16),
        "owners": torch.tensor([1]),
        "integers": torch.zeros(6, 2, 16, dtype=torch.int8),
        "scales": torch.zeros(6, 2),
        "into": torch.tensor([5]),
    }
    cpu.quantize_into(**arguments | given)


@needs_kernels
@pytest.mark.parametrize(
    ("sentence", "call"),
    [
        ("slots must be between -1 and 19, got 20", lambda: write([0, 20])),
        ("slots must be between -1 and 19, got -2", lambda: write([-2])),
        ("slots must be between 0 and 3, got 4", lambda: write([1, 2, 3, 4])),
        ("values must be float32 like keys, got float16", lambda: write([0], values=torch.rand(3, 3, 16).half())),
        ("value_rows must be of shape [*, 3, 16], got [9, 3, 8]", lambda: write([0], value_rows=torch.rand(9, 3, 8))),
        ("chosen must be between 0 and 5, got 6", lambda: fill(chosen=torch.tensor([[0, 6]]))),
        ("sequences must be between 0 and 0, got 1", lambda: fill(sequences=torch.tensor([1]))),
        ("places must be between 0 and 2, got 3", lambda: fill(places=torch.tensor([3]))),
        ("slots must be int64, got int32", lambda: fill(slots=torch.zeros(4, dtype=torch.int32))),
        ("sequences must be between -1 and 0, got 1", lambda: ranges((1, 0, 1))),
        ("ranges must be between 0 and 6, got 7", lambda: ranges((0, 5, 7))),
        ("ranges must be between 0 and 3, got -1", lambda: ranges((0, -1, 3))),
        ("tokens must be between 0 and 4, got 5", lambda: quantize(tokens=torch.tensor([5]))),
        ("owners must be between 0 and 1, got 2", lambda: quantize(owners=torch.tensor([2]))),
        ("into must be between 0 and 5, got -1", lambda: quantize(into=torch.tensor([-1]))),
        ("scales must be of shape [6, 2], got [5, 2]", lambda: quantize(scales=torch.zeros(5, 2))),
        ("integers must be int8, got float32", lambda: quantize(integers=torch.zeros(6, 2, 16))),
    ],
)
def test_wrong_arguments_are_named(sentence: str, call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        call()
    assert str(error.value) == sentence


@needs_kernels
def test_right_arguments_pass() -> None:
    write([0, 19, -1])
    fill()
    ranges((0, 0, 6), (-1, 0, 9), (0, 6, 6))
    quantize()
