"""The native operations as a part of PyTorch: opaque in compiled code, and on its threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from cases import Sparse, Votes, sparse_case, votes_case

from tokenselect.ops import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=f"native kernels: {cpu.why_missing()}")

_NOTHING = torch.empty(0)
_NO_RUNS = torch.empty(0, dtype=torch.int64)


def vote(case: Votes) -> Callable[[Tensor], Tensor]:
    """Pooled queries to the indices that they choose, as one step calls the operations."""
    pages, views = case.cache.pages, case.views
    lengths = case.candidates[:, 1] - case.candidates[:, 0]
    start_loc = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    padding, count = torch.tensor(pages.padding), int(start_loc[-1])
    rotations = [part for view in views for part in (view.cos, view.sin, view.run_start_loc, view.run_size)]

    def step(queries: Tensor) -> Tensor:
        votes = torch.empty(count)
        torch.ops.tokenselect.score_tokens(
            queries * 2, case.cache.keys, _NOTHING, pages.pages, padding, pages.page_size, case.of, case.candidates,
            case.candidates, *rotations, False, case.scale, start_loc, _NOTHING, *2 * [_NO_RUNS], 0.0, 0.0, votes,
        )  # fmt: skip
        indices = torch.empty(4, 7, dtype=torch.int64)
        torch.ops.tokenselect.topk_tokens(votes * 1.0, start_loc, 7, indices)
        return indices + 1

    return step


def attend(case: Sparse) -> Callable[[Tensor], Tensor]:
    slots = [case.cache.pages.slots(row, torch.tensor(positions)) for row, positions, _ in case.blocks]
    bounds = [torch.tensor([0, *lengths]).cumsum(0) for lengths in ([5, 1, 7, 9], [len(part) for part in slots])]
    chosen = torch.cat(slots)

    def step(queries: Tensor) -> Tensor:
        out = torch.empty_like(queries)
        torch.ops.tokenselect.sparse_attention(
            queries * 2, case.cache.keys, case.cache.values, bounds[0], chosen, bounds[1], case.cos, case.sin,
            0.2, False, 0.0, _NOTHING, out,
        )  # fmt: skip
        return out + 1

    return step


_NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=_NEEDS_COMPILER)])
@pytest.mark.parametrize("name", ["vote", "attend"])
def test_compiled_steps_give_the_same(name: str, backend: str) -> None:
    case = votes_case() if name == "vote" else sparse_case()
    step = vote(case) if name == "vote" else attend(case)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(case.queries), step(case.queries))
    assert torch.equal(compiled(case.queries + 1), step(case.queries + 1))


@pytest.mark.parametrize("name", ["vote", "attend"])
def test_wrong_arguments_in_compiled_code_raise(name: str) -> None:
    case = votes_case() if name == "vote" else sparse_case()
    compiled = torch.compile(vote(case) if name == "vote" else attend(case), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"must be"):
        compiled(case.queries[:, :5].contiguous())


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_those_of_pytorch() -> None:
    """In a fresh process, whose threads nobody else has started."""
    answer = subprocess.run([sys.executable, "-c", _COUNT_THREADS], capture_output=True, text=True, check=True)
    before, alone, three, pytorch = map(int, answer.stdout.split())
    assert before == alone < three == pytorch


_COUNT_THREADS = """
import os, torch
from tokenselect.ops import cpu
assert cpu.why_missing() is None
votes, bounds, rows = torch.rand(1 << 20), torch.tensor([0, 1 << 20]), torch.rand(1 << 12, 2, 64)
zero_to_all, slots, angles = torch.tensor([0, 1 << 12]), torch.arange(1 << 12), torch.ones(1 << 12, 32)
def threads():
    cpu.topk_tokens(votes, bounds, 9)
    cpu.sparse_attention(rows[:1], rows, rows, torch.tensor([0, 1]), slots, zero_to_all, angles, angles, 1.0)
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
print(len(os.listdir("/proc/self/task")), threads())
torch.set_num_threads(3)
print(threads())
(votes + votes).sum()
print(threads())
"""
