"""Wrong arguments of the native kernels: refused by name, what was expected and what came, and never a crash."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import sparse_case, votes_case

from tokenselect.ops import cpu
from tokenselect.ops.paging import PageTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=f"native kernels: {cpu.why_missing()}")


def attend(**changes: Any) -> Tensor:
    case = sparse_case()
    slots = [case.cache.pages.slots(row, torch.tensor(positions)) for row, positions, _ in case.blocks]
    given = {
        "queries": case.queries,
        "keys": case.cache.keys,
        "values": case.cache.values,
        "query_start_loc": torch.tensor([0, 5, 6, 13, 22]),
        "slots": torch.cat(slots),
        "slot_start_loc": torch.tensor([0, *(len(part) for part in slots)]).cumsum(0),
        "cos": case.cos,
        "sin": case.sin,
        "scale": 0.2,
    }
    return cpu.sparse_attention(**given_but(given, changes))


def score(**changes: Any) -> tuple[Tensor, Tensor]:
    case = votes_case()
    given = {
        "queries": case.queries,
        "keys": case.cache.keys,
        "pages": case.cache.pages,
        "sequences": case.of,
        "candidates": case.candidates,
        "distances": case.views,
        "scale": 0.3,
        "context": None,
        "key_scales": None,
    }
    return cpu.score_tokens(**given_but(given, changes))


def given_but(given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments, some of them replaced by another value or by a function of theirs."""
    return given | {name: new(given[name]) if callable(new) else new for name, new in changes.items()}


def at(index: Any, value: float) -> Callable[[Tensor], Tensor]:
    """A copy with one element replaced."""

    def change(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy[index] = value
        return copy

    return change


ATTENTION: list[tuple[str, dict[str, Any]]] = [
    ("queries must be of shape [*, *, *], got [22, 6]", {"queries": lambda x: x[..., 0]}),
    ("keys must be bfloat16 like queries, got float32", {"queries": lambda x: x.bfloat16()}),
    ("values must be float32 like queries, got float16", {"values": lambda x: x.half()}),
    ("queries must be float32, bfloat16 or float16, got int8", {"queries": lambda x: x.to(torch.int8)}),
    ("queries must be float32, bfloat16, float16 or int8, got float64", {"queries": lambda x: x.double()}),
    ("keys must be of shape [*, *, 16], got [141, 2, 8]", {"keys": lambda x: x[..., :8]}),
    ("values must be of shape [*, 2, 16], got [141, 1, 16]", {"values": lambda x: x[:, :1]}),
    ("num_q_heads must be a multiple of num_kv_heads (2), got 5", {"queries": lambda x: x[:, :5]}),
    ("slots must be int64, got int32", {"slots": lambda x: x.int()}),
    ("slots must be contiguous, got strides [2]", {"slots": lambda x: x.repeat_interleave(2)[::2]}),
    ("slots must be between 0 and 140, got 141", {"slots": at(3, 141)}),
    ("slots must be between 0 and 140, got -1", {"slots": at(-1, -1)}),
    ("query_start_loc must be between 6 and 22, got 4", {"query_start_loc": at(3, 4)}),
    ("query_start_loc must be between 13 and 22, got 23", {"query_start_loc": at(4, 23)}),
    ("query_start_loc must be between 0 and 0, got 1", {"query_start_loc": at(0, 1)}),
    ("slot_start_loc must be between 46 and 55, got 56", {"slot_start_loc": at(4, 56)}),
    ("slot_start_loc must be of shape [5], got [4]", {"slot_start_loc": lambda x: x[1:]}),
    ("slots of a block must be at least its 5 queries, got 4", {"slot_start_loc": at(1, 4)}),
    ("cos must be of at least 22 rows, got 21", {"cos": lambda x: x[:21], "sin": lambda x: x[:21]}),
    ("sin must be of shape [64, 8], got [63, 8]", {"sin": lambda x: x[:63]}),
    ("cos must be float32, got bfloat16", {"cos": lambda x: x.bfloat16()}),
    ("rotary_dim / 2 must be between 0 and 8, got 9", {"cos": torch.ones(64, 9), "sin": torch.ones(64, 9)}),
    ("sink_logits must be of shape [6], got [2]", {"sink_logits": torch.zeros(2)}),
]

SCORING: list[tuple[str, dict[str, Any]]] = [
    ("queries must be float32, got bfloat16", {"queries": lambda x: x.bfloat16()}),
    ("queries must be of shape [*, *, *], got [4, 6]", {"queries": lambda x: x[..., 0]}),
    ("keys must be of shape [*, *, 16], got [111, 2, 8]", {"keys": lambda x: x[..., :8]}),
    ("key_scales must be of shape [111, 2], got [0]", {"keys": lambda x: x.nan_to_num().to(torch.int8)}),
    ("key_scales must be absent unless keys are int8, got some", {"key_scales": torch.ones(111, 2)}),
    ("sequences must be int64, got int32", {"sequences": lambda x: x.int()}),
    ("sequences must be between 0 and 1, got 2", {"sequences": at(3, 2)}),
    ("sequences must be of shape [4], got [3]", {"sequences": lambda x: x[:3]}),
    ("candidates must be between 3 and", {"candidates": at((0, 1), 2)}),
    ("candidates must be of shape [4, 2], got [3, 2]", {"candidates": lambda x: x[:3]}),
    ("candidates must be between 0 and", {"candidates": at((0, 0), -1)}),
    ("context must be between 0 and 19, got 33", {"candidates": at((3, 1), 100)}),
    ("context must be between 0 and 3, got 4", {"context": torch.tensor([[4, 30], [0, 23], [0, 24], [0, 53]])}),
    ("padding must be of shape [2], got [1]", {"pages": lambda x: replace(x, padding=[0])}),
    ("padding must be between 0 and", {"pages": lambda x: replace(x, padding=[0, -1])}),
    ("page_size must be between 1 and", {"pages": lambda x: replace(x, page_size=0)}),
    ("pages must be between 0 and 36, got 37", {"pages": lambda x: replace(x, pages=at((0, 2), 37)(x.pages))}),
    ("pages must be int64, got int32", {"pages": lambda x: replace(x, pages=x.pages.int())}),
    ("context must be between 0 and 110, got 111", {"pages": PageTable(torch.tensor([[0], [0]]), 111, [0, 59])}),
    ("distances must be one or two views, got 3", {"distances": lambda x: [*x, x[0]]}),
    ("distances must be one or two views, got 0", {"distances": ()}),
    ("key_center must be absent unless keys are int8, got some", {"key_center": torch.ones(2, 2, 16)}),
    (
        "key_center must be of shape [2, 2, 16], got [2, 16]",
        {
            "keys": lambda x: x.nan_to_num().to(torch.int8),
            "key_scales": torch.ones(111, 2),
            "key_center": torch.ones(2, 16),
        },
    ),
    ("run_size must be between 1 and", {"distances": lambda x: [replace(x[0], run_size=0), x[1]]}),
    ("cos must be of shape [*, 8], got [31, 4]", {"distances": lambda x: [x[0], replace(x[1], cos=x[1].cos[:, :4])]}),
    ("sin must be of shape", {"distances": lambda x: [replace(x[0], sin=x[0].sin[:2]), x[1]]}),
    (
        "run_start_loc must be between 18 and 31, got 99",
        {"distances": lambda x: [x[0], replace(x[1], run_start_loc=at(-1, 99)(x[1].run_start_loc))]},
    ),
    (
        "runs of a block must be between 1 and",
        {"distances": lambda x: [x[0], replace(x[1], run_start_loc=at(1, 0)(x[1].run_start_loc))]},
    ),
    (
        "alike must be between 0 and 7, got 8",
        {"distances": lambda x: [x[0], replace(x[1], alike=torch.tensor([8, 0, 0, 0]))]},
    ),
    ("alike must be of shape [4], got [1]", {"distances": lambda x: [x[0], replace(x[1], alike=torch.tensor([0]))]}),
]


def ids(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [sentence.split(",")[0].replace(" ", "_") for sentence, _ in cases]


@pytest.mark.parametrize(("sentence", "changes"), ATTENTION, ids=ids(ATTENTION))
def test_wrong_arguments_of_attention_are_named(sentence: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        attend(**changes)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(("sentence", "changes"), SCORING, ids=ids(SCORING))
def test_wrong_arguments_of_scoring_are_named(sentence: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        score(**changes)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("sentence", "votes", "start_loc", "k"),
    [
        ("k must be >= 1, got 0", torch.rand(9), [0, 9], 0),
        ("k must be between 1 and 4, got 5", torch.rand(9), [0, 5, 9], 5),
        ("start_loc must be between 5 and 9, got 10", torch.rand(9), [0, 5, 10], 2),
        ("start_loc must be between 6 and 9, got 5", torch.rand(9), [0, 6, 5], 2),
        ("votes must be float32, got float16", torch.rand(9).half(), [0, 9], 2),
        ("votes must be of shape [*], got [3, 3]", torch.rand(3, 3), [0, 9], 2),
    ],
)
def test_wrong_arguments_of_topk_are_named(sentence: str, votes: Tensor, start_loc: list[int], k: int) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        cpu.topk_tokens(votes, torch.tensor(start_loc), k)
    assert str(error.value) == sentence


ROWS = torch.rand(3, 32)


def int8(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("sentence", "call"),
    [
        ("rows must be as long as the weight's, got [3, 32]", lambda: cpu.linear(ROWS, torch.rand(5, 16))),
        ("weight must be float32 like rows, got float16", lambda: cpu.linear(ROWS, torch.rand(5, 32).half())),
        ("weight must be of rows whose size is a multiple of 16, got 8", lambda: cpu.linear(ROWS, torch.rand(5, 8))),
        ("weight must be contiguous, got strides [1, 5]", lambda: cpu.linear(ROWS, torch.rand(32, 5).T)),
        ("bias must be of shape [5], got [4]", lambda: cpu.linear(ROWS, torch.rand(5, 32), torch.rand(4))),
        (
            "bias must be float32 like rows, got bfloat16",
            lambda: cpu.linear(ROWS, torch.rand(5, 32), ROWS[0, :5].bfloat16()),
        ),
        ("weight must be of shape [*], got [1, 32]", lambda: cpu.rms_norm(ROWS, torch.rand(1, 32), 1e-5)),
        ("rows must be as long as the weight's, got [3, 32]", lambda: cpu.rms_norm(ROWS, torch.rand(16), 1e-5)),
        ("rows must be of shape [*, *, *], got [1, 3]", lambda: cpu.quantize_rows(torch.rand(1, 3))),
        ("head_dim must be a multiple of 16 up to 256, got 8", lambda: cpu.quantize_rows(torch.rand(1, 3, 8))),
        (
            "integers must be of shape [1, 3, 16], got [2, 3, 16]",
            lambda: cpu.quantize_rows(torch.rand(1, 3, 16), None, (int8(2, 3, 16), torch.empty(2, 3))),
        ),
        (
            "integers must be contiguous in its last dimension, got strides [48, 1, 3]",
            lambda: cpu.quantize_rows(torch.rand(1, 3, 16), None, (int8(1, 16, 3).mT, torch.empty(1, 3))),
        ),
        (
            "scales must be of shape [1, 3], got [3, 1]",
            lambda: cpu.quantize_rows(torch.rand(1, 3, 16), None, (int8(1, 3, 16), torch.empty(3, 1))),
        ),
        ("center must be of shape [3, 16], got [16]", lambda: cpu.quantize_rows(torch.rand(1, 3, 16), torch.rand(16))),
        (
            "center must be float32, got float16",
            lambda: cpu.quantize_rows(torch.rand(1, 3, 16), torch.rand(3, 16).half()),
        ),
    ],
)
def test_wrong_arguments_of_the_other_operations_are_named(sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        call()
    assert str(error.value) == sentence


def pool(starts: tuple[int, ...] = (0, 4), counts: tuple[int, ...] = (4, 2), **given: Tensor) -> Tensor:
    arguments = {"queries": torch.rand(9, 2, 16), "cos": torch.rand(4, 8), "sin": torch.rand(4, 8), **given}
    return cpu.pool_queries(starts=torch.tensor(starts), counts=torch.tensor(counts), **arguments)


@pytest.mark.parametrize(
    ("sentence", "call"),
    [
        ("counts must be between 1 and 1, got 2", lambda: pool(starts=(0, 8))),
        ("starts must be between 0 and 9, got -1", lambda: pool(starts=(-1, 4))),
        ("counts must be between 1 and 9, got 0", lambda: pool(counts=(0, 2))),
        ("counts must be between 1 and 4, got 5", lambda: pool(counts=(5, 2))),
        ("counts must be of shape [2], got [1]", lambda: pool(counts=(4,))),
        ("sin must be of shape [4, 8], got [2, 8]", lambda: pool(sin=torch.rand(2, 8))),
        ("queries must be of shape [*, *, *], got [9, 16]", lambda: pool(queries=torch.rand(9, 16))),
    ],
)
def test_wrong_arguments_of_pooling_are_named(sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        call()
    assert str(error.value) == sentence


def test_right_arguments_pass() -> None:
    assert pool().shape == (2, 2, 16)
    assert attend().shape == (22, 6, 16)
    assert score()[1].tolist() == [0, 27, 47, 68, 118]
    nothing = torch.empty(0, dtype=torch.int64)
    assert cpu.sparse_attention(
        torch.empty(0, 6, 16),
        torch.empty(0, 2, 16),
        torch.empty(0, 2, 16),
        torch.zeros(1, dtype=torch.int64),
        nothing,
        torch.zeros(1, dtype=torch.int64),
        torch.empty(0, 8),
        torch.empty(0, 8),
        0.2,
    ).shape == (0, 6, 16)
