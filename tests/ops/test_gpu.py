"""The Triton kernels against the definition: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import HEADS, LAYOUTS, Sparse, Votes, angles, paged, sequences_of, shapes, sparse_case, votes_case

from tokenselect.ops import BackendUnavailable, find_backend, gpu, reference
from tokenselect.ops.paging import PageTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Votes add up to 2 a block; exponentials of 16-bit keys are kept in half precision and queries are rounded to the
# keys' type. The reference computes attention in the dtype of its inputs, the kernels in float32: they differ by what
# it rounds.
VOTES = 2e-4
ROUNDED_VOTES = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ATTENTION = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def _interpreted_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers: widen them first."""
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), triton.language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def moved(value: Any, device: torch.device = DEVICE) -> Any:
    """Tensors on the device, with the very same strides over the very same memory, and what holds them."""
    if isinstance(value, torch.Tensor):
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, PageTable):
        return replace(value, pages=moved(value.pages))
    if isinstance(value, reference.Distances):
        parts = {name: moved(getattr(value, name)) for name in ("cos", "sin", "run_start_loc", "alike")}
        return replace(value, **parts)
    return [moved(item) for item in value] if isinstance(value, list) else value


def on_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that is given CPU tensors and runs on the device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        out = operation(*map(moved, args), **{name: moved(value) for name, value in kwargs.items()})
        return tuple(part.cpu() for part in out) if isinstance(out, tuple) else out.cpu()

    return call


ours: Any = SimpleNamespace(
    score_tokens=on_device(gpu.score_tokens),
    pool_queries=on_device(gpu.pool_queries),
    quantize_rows=on_device(gpu.quantize_rows),
    topk_tokens=on_device(gpu.topk_tokens),
    sparse_attention=on_device(gpu.sparse_attention),
)


def check_votes(case: Votes, atol: float = VOTES, rtol: float = 0.0) -> None:
    (made, made_at), (expected, expected_at) = case.score(ours), case.score()
    assert torch.equal(made_at, expected_at)
    torch.testing.assert_close(made, expected, atol=atol, rtol=rtol)


def check_attention(case: Sparse) -> None:
    made, expected = case.run(ours), case.run()
    assert made.dtype == expected.dtype
    torch.testing.assert_close(made, expected, atol=ATTENTION[made.dtype], rtol=0)


# -- votes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scoring", ["position_free", "distance", "mix"])
@pytest.mark.parametrize("context", [False, True], ids=["", "context"])
def test_votes(layout: str, scoring: str, context: bool) -> None:
    check_votes(votes_case(layout, scoring=scoring, context=context))


@pytest.mark.parametrize("horizon", [1.0, 20.0, 512.0])
@pytest.mark.parametrize("context", [False, True], ids=["", "context"])
@pytest.mark.parametrize("prior", [0.0, 0.05])
def test_votes_count_less_by_age(horizon: float, context: bool, prior: float) -> None:
    check_votes(votes_case(context=context, horizon=horizon, prior=prior))


def test_a_prior_without_a_horizon_changes_nothing() -> None:
    case = votes_case()
    assert torch.equal(replace(case, prior=0.05).score(ours)[0], case.score(ours)[0])


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_votes_of_every_head_size(dim: int, dtype: torch.dtype) -> None:
    check_votes(votes_case(dim=dim, dtype=dtype, context=True), ROUNDED_VOTES[dtype])


@pytest.mark.parametrize("heads", [*HEADS, (16, 1), (14, 2)], ids=shapes)
def test_votes_of_every_group_size(heads: tuple[int, int]) -> None:
    check_votes(votes_case(heads=heads))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5, 2])
def test_votes_in_every_rotary_layout(half: int, interleaved: bool) -> None:
    check_votes(votes_case(half=half, interleaved=interleaved))


def long_case(
    dtype: torch.dtype, run_size: int = 64, length: int = 700, blocks: int = 1, interleaved: bool = False
) -> Votes:
    """Several tiles and shares of keys; blocks of one sequence that share a context's start."""
    heads, half = (6, 2), 16
    sequences = sequences_of([length], heads[1], 2 * half, dtype)
    ends = [length - 50 - 3 * i for i in range(blocks)]
    candidates = torch.tensor([[7, end] for end in ends])
    counts = [-(-(end - 7) // run_size) for end in ends]
    views = []
    for size, runs in ((1, [1] * blocks), (run_size, counts)):
        cos, sin = angles(sum(runs), half)
        start_loc = torch.tensor([0, *runs]).cumsum(0)
        views.append(reference.Distances(0.9 * cos, 0.9 * sin, size, start_loc, interleaved))
    queries = torch.randn(blocks, heads[0], 2 * half)
    of = torch.zeros(blocks, dtype=torch.int64)
    return Votes(paged(sequences, 16), sequences, queries, of, candidates, None, views, 0.2)


@pytest.mark.parametrize("blocks", [1, 5])
def test_votes_of_many_tiles_count_less_by_age(blocks: int) -> None:
    check_votes(replace(long_case(torch.float32, blocks=blocks), horizon=30.0, prior=1e-4), atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("run_size", [64, 128, 48, 20])
@pytest.mark.parametrize("blocks", [1, 5])
def test_votes_of_runs_of_any_size(run_size: int, blocks: int) -> None:
    check_votes(long_case(torch.float32, run_size, 260, blocks), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_votes_over_many_tiles(dtype: torch.dtype, interleaved: bool) -> None:
    # A vote is a share of 2 over hundreds of tokens: what counts is the error next to the vote.
    case = long_case(dtype, interleaved=interleaved)
    check_votes(case, atol=1e-7, rtol={torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype])


def test_votes_of_blocks_that_do_not_fit_in_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.ops.gpu import score

    monkeypatch.setattr(score, "_MOST_WEIGHTS", 20_000)
    check_votes(long_case(torch.float32, 64, 300, 7))
    check_votes(votes_case())


def test_votes_of_blocks_that_begin_apart() -> None:
    case = votes_case()
    case.candidates = torch.tensor([[3, 30], [6, 23], [6, 24], [9, 53]])
    case.views = [replace(view) for view in votes_case(scoring="position_free").views]
    check_votes(case)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_votes_are_numbers_when_every_head_looks_at_the_sinks(size: float) -> None:
    case = votes_case("strided", (2, 1), scoring="position_free", context=True)
    case.cache.keys[0] = case.queries[0].mean(0) * size
    votes = case.score(ours)[0]
    assert votes.isfinite().all()
    assert (votes >= 0).all()


def by_int8_copy(case: Votes, centered: bool) -> tuple[Any, ...]:
    """Arguments that score a case by an int8 copy of its keys, counted from a center of each sequence."""
    case.cache.keys.nan_to_num_(3.0)
    center = torch.randn(len(case.sequences), *case.cache.keys.shape[1:]) if centered else None
    keys, scales = reference.quantize_rows(case.cache.keys)
    given = (case.queries, keys, case.cache.pages, case.of, case.candidates, case.views, case.scale, case.context)
    return (*given, scales, center)


@pytest.mark.parametrize("centered", [False, True], ids=["", "center"])
@pytest.mark.parametrize("layout", ["page1", "page16", "padded"])
@pytest.mark.parametrize("dim", [16, 80])
def test_votes_by_an_int8_copy(layout: str, dim: int, centered: bool) -> None:
    given = by_int8_copy(votes_case(layout, dim=dim), centered)
    expected = reference.score_tokens(*given)[0]
    torch.testing.assert_close(ours.score_tokens(*given)[0], expected, atol=ROUNDED_VOTES[torch.float16], rtol=0)


@pytest.mark.parametrize("centered", [False, True], ids=["", "center"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_votes_by_an_int8_copy_over_many_tiles(blocks: int, centered: bool) -> None:
    given = by_int8_copy(long_case(torch.float32, length=400, blocks=blocks), centered)
    expected = reference.score_tokens(*given)[0]
    torch.testing.assert_close(ours.score_tokens(*given)[0], expected, atol=1e-7, rtol=5e-3)


# -- around the operations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(("blocks", "alike"), [(1, 3), (1, 0), (1, 10), (3, 4)])
def test_votes_of_runs_that_rotate_alike(blocks: int, alike: int, copied: bool) -> None:
    case = long_case(torch.float32, blocks=blocks)
    view = case.views[1]
    for first in view.run_start_loc[:-1].tolist():
        for part in (view.cos, view.sin):
            part[first : first + alike] = part[first].clone()
    case.views[1] = replace(view, alike=torch.full((blocks,), alike))
    if not copied:
        return check_votes(case, atol=1e-7, rtol=1e-3)
    given = by_int8_copy(case, True)
    (made, _), (expected, _) = ours.score_tokens(*given), reference.score_tokens(*given)
    torch.testing.assert_close(made, expected, atol=VOTES, rtol=0)
    return None


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [16, 10])
def test_pooled_queries(half: int, interleaved: bool) -> None:
    starts, counts = torch.tensor([0, 150, 151]), torch.tensor([150, 1, 20])
    given = (torch.randn(171, 3, 32), starts, counts, *angles(150, half), interleaved)
    torch.testing.assert_close(ours.pool_queries(*given), reference.pool_queries(*given), atol=2e-6, rtol=0)


def test_pooled_single_queries() -> None:
    given = (torch.randn(4, 3, 32), torch.arange(4), torch.ones(4, dtype=torch.int64), *angles(4, 16))
    torch.testing.assert_close(ours.pool_queries(*given), reference.pool_queries(*given), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("centered", [False, True], ids=["", "center"])
def test_quantized_rows(dtype: torch.dtype, centered: bool) -> None:
    rows, center = torch.randn(70, 2, 80).to(dtype), torch.randn(2, 80) if centered else None
    rows[3] = 0 if center is None else center.to(dtype)
    (integers, scales), (expected, expected_scales) = (
        ours.quantize_rows(rows, center),
        reference.quantize_rows(rows, center),
    )
    torch.testing.assert_close(scales, expected_scales)
    assert int((integers.int() - expected.int()).abs().max()) <= 1  # where a tie falls may differ
    assert float((integers != expected).float().mean()) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attended_slots_are_those_of_sinks_chosen_and_window(layout: str) -> None:
    from tokenselect.ops.gpu import around

    pages = LAYOUTS[layout](sequences_of([41, 60], 1, 8, torch.float32)).pages
    chosen = torch.tensor([[0, 5, 9], [2, 3, 30]])
    slots, start_loc = around.attended_slots(moved(chosen), moved(pages), [0, 1], [30, 50], [41, 53], 4)
    positions = [[*range(4), 4, 9, 13, *range(30, 41)], [*range(4), 6, 7, 34, *range(50, 53)]]
    expected = torch.cat([pages.slots(i, torch.tensor(own)) for i, own in enumerate(positions)])
    assert start_loc == [0, 18, 28]
    assert torch.equal(slots.cpu(), expected)


@pytest.mark.parametrize("parts", [1, 3])
def test_least_cosine(parts: int) -> None:
    from tokenselect.ops.gpu import around

    now, then = torch.randn(2, 6, 20), torch.randn(2, 6, 20)
    expected = torch.cosine_similarity(now.reshape(2, parts, -1), then.reshape(2, parts, -1), dim=-1).amin(1)
    made = around.least_cosine(moved(now), moved(then), parts)
    torch.testing.assert_close(made.cpu(), expected, atol=1e-6, rtol=0)


# -- the most votes --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[int], Tensor]] = {
    "random": torch.rand,
    "equal": torch.ones,
    "zero": torch.zeros,
    "ties": lambda n: torch.randint(0, 7, (n,)) / 7,
    "tiny": lambda n: torch.rand(n) * 1e-40,
    "wide": lambda n: torch.exp(torch.randn(n) * 30),
    "at one end": lambda n: (torch.rand(n) + 0.1) / torch.arange(n, 0, -1),
    "infinite": lambda n: torch.where(torch.rand(n) < 0.1, float("inf"), torch.rand(n)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "k"), [(1, 1), (7, 7), (1000, 1), (9001, 2048), (9001, 9000)])
def test_topk_is_exact_and_prefers_the_lowest_index(kind: str, count: int, k: int) -> None:
    votes, start_loc = KINDS[kind](count), torch.tensor([0, count])
    assert torch.equal(ours.topk_tokens(votes, start_loc, k), reference.topk_tokens(votes, start_loc, k))


def test_topk_of_many_votes() -> None:
    votes, start_loc = torch.randint(0, 1 << 16, (40_000,)).float(), torch.tensor([0, 40_000])
    assert torch.equal(ours.topk_tokens(votes, start_loc, 2048), reference.topk_tokens(votes, start_loc, 2048))


def chunk_maxima(votes: Tensor, chunks: int) -> Tensor:
    """Bits of the largest of each n-th vote, -1 where there is none."""
    bits = torch.nn.functional.pad(votes.view(torch.int32), (0, -len(votes) % chunks), value=-1)
    return bits.view(-1, chunks).amax(0)


@pytest.mark.parametrize("scoring", ["position_free", "distance", "mix"])
def test_votes_come_with_the_maxima_of_their_chunks(scoring: str) -> None:
    from tokenselect.ops.gpu.score import score_tokens
    from tokenselect.ops.gpu.topk import Maxima

    case = votes_case(scoring=scoring, horizon=20.0, prior=1e-3)
    chunks = 32  # some of which have no vote
    left = torch.full((chunks * len(case.of),), 1 << 30, dtype=torch.int32, device=DEVICE)  # by another call
    maxima = replace(Maxima.of(len(case.of), 1, DEVICE), chunks=chunks, values=left)
    given = case.queries, case.cache.keys, case.cache.pages, case.of, case.candidates, case.views
    votes, start_loc = score_tokens(*map(moved, given), case.scale, horizon=20.0, prior=1e-3, maxima=maxima)
    votes, start_loc = votes.cpu(), start_loc.tolist()
    expected = torch.stack([chunk_maxima(votes[a:b], chunks) for a, b in pairwise(start_loc)])
    assert torch.equal(maxima.values.cpu().view(-1, chunks), expected)
    assert (expected == -1).any()
    assert maxima.num_listed.tolist() == [0] * len(case.of)


def test_few_more_votes_are_listed_than_chosen_where_the_nearest_have_most() -> None:
    """Else every program would go through a long list again and again."""
    from tokenselect.ops.gpu.topk import Maxima, topk_tokens

    count, k = 60_000, 512
    votes, start_loc = KINDS["at one end"](count), torch.tensor([0, count])
    maxima = Maxima.of(1, k, DEVICE)
    maxima.values.copy_(chunk_maxima(votes, maxima.chunks))
    maxima.num_listed.zero_()
    chosen = topk_tokens(votes.to(DEVICE), start_loc, k, maxima=maxima)
    assert torch.equal(chosen.cpu(), reference.topk_tokens(votes, start_loc, k))
    assert k <= int(maxima.num_listed) < 1.5 * k


def test_topk_of_a_ragged_batch() -> None:
    votes, start_loc = torch.rand(6000), torch.tensor([0, 64, 100, 6000])
    assert torch.equal(ours.topk_tokens(votes, start_loc, 33), reference.topk_tokens(votes, start_loc, 33))


def test_topk_takes_a_negative_zero_for_a_zero() -> None:
    votes, start_loc = torch.tensor([-0.0, 0.0, 0.5, -0.0]), torch.tensor([0, 4])
    assert ours.topk_tokens(votes, start_loc, 2).tolist() == [[0, 2]]


# -- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
def test_attention(layout: str, dtype: torch.dtype) -> None:
    check_attention(sparse_case(layout, dtype=dtype))


@pytest.mark.parametrize("heads", [*HEADS, (16, 1), (14, 2)], ids=shapes)
def test_attention_of_every_group_size(heads: tuple[int, int]) -> None:
    check_attention(sparse_case(heads=heads))


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_attention_of_every_head_size(dim: int, dtype: torch.dtype) -> None:
    case = sparse_case("strided", (4, 1), dim, dtype)
    case.scale = dim**-0.5
    check_attention(case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5, 2])
@pytest.mark.parametrize("own", [1, 40])
def test_attention_in_every_rotary_layout(half: int, interleaved: bool, own: int) -> None:
    case = sparse_case(half=half, interleaved=interleaved)
    if own > 1:
        case.queries, case.blocks = torch.randn(own, 6, 16), [(2, list(range(5, 60)), own)]
    check_attention(case)


@pytest.mark.parametrize("softcap", [None, 0.7, 50.0])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("own", [1, 40])
def test_attention_with_soft_cap_and_sink_logits(softcap: float | None, sinks: bool, own: int) -> None:
    case = sparse_case(softcap=softcap, sink_logits=torch.randn(6) * 3 if sinks else None)
    if own > 1:
        case.queries, case.blocks = torch.randn(own, 6, 16), [(2, list(range(5, 60)), own)]
    check_attention(case)


def block_case(own: int, length: int, dtype: torch.dtype = torch.float32) -> Sparse:
    """One block of `own` queries over `length` of 1,500 tokens."""
    sequences = sequences_of([1500], 1, 32, dtype)
    positions = torch.randperm(1500)[:length].sort().values.tolist()
    cos, sin = angles(length, 16)
    queries = torch.randn(own, 3, 32).to(dtype)
    return Sparse(sequences, paged(sequences, 16), queries, [(0, positions, own)], cos, sin, {}, 0.125)


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize(("own", "length"), [(1, 1), (1, 1400), (3, 129), (22, 300), (200, 200), (157, 700)])
def test_attention_of_blocks_of_any_size(own: int, length: int, dtype: torch.dtype) -> None:
    check_attention(block_case(own, length, dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("last_served", [0, 1])
def test_steps_attend_what_their_last_selection_says_where_it_serves(last_served: int, interleaved: bool) -> None:
    from tokenselect.ops.gpu.attention import Last, attend_steps

    num_fixed, num_slots = 23, 160  # of a sequence: sinks and selected tokens, and with the local window
    positions, windows, firsts = torch.tensor([450, 400]), torch.tensor([350, 395]), torch.tensor([0, 500])
    lengths = num_fixed + positions + 1 - windows
    keys, values = (torch.randn(1000, 2, 64, device=DEVICE) for _ in range(2))
    queries, (cos, sin) = torch.randn(2, 4, 64, device=DEVICE), (part.to(DEVICE) for part in angles(num_slots, 32))
    slots = torch.stack([first + torch.randperm(300)[:num_slots] for first in firsts])
    for row, (length, window, first) in enumerate(zip(lengths, windows, firsts, strict=True)):
        slots[row, num_fixed:length] = first + window + torch.arange(int(length) - num_fixed)
    starts = torch.tensor([0, int(lengths[0]), int(lengths.sum())])
    attended = torch.cat([slots[row, :length] for row, length in enumerate(lengths.tolist())])
    given = (queries, keys, values, torch.arange(3), attended.to(DEVICE), starts, cos, sin, 0.125)
    expected = reference.sparse_attention(*given, interleaved=interleaved)

    served = torch.tensor([last_served, 1 - last_served])
    bounds = torch.stack((torch.arange(2), torch.ones(2, dtype=torch.int64), torch.arange(2) * num_slots, lengths), 1)
    numbers, served = torch.stack((windows, served)).to(DEVICE), served.to(DEVICE)
    last = Last(numbers, positions.to(DEVICE), firsts.to(DEVICE), num_fixed, num_slots)
    made = torch.full_like(queries, 7.0)
    for given_last in (None, last):
        if given_last is not None:  # who is served has yet to be told where its own token lies
            slots[torch.arange(2), lengths - 1] = 0
        attend_steps(
            queries, keys, values, slots.flatten().to(DEVICE), bounds.flatten().to(DEVICE), num_slots, cos, sin, 0.125,
            made, interleaved=interleaved, served=served, last=given_last,
        )  # fmt: skip
        done = served == (given_last is not None)
        torch.testing.assert_close(made[done], expected[done], atol=2e-5, rtol=0)
        if given_last is None:
            assert (made[~done] == 7).all()


def test_queries_of_no_block_get_zeros() -> None:
    case = sparse_case()
    case.queries = torch.cat((case.queries, torch.full((2, 6, 16), float("nan"))))
    made = case.run(ours)
    assert torch.equal(made[22:], torch.zeros(2, 6, 16))
    assert made.isfinite().all()


# -- in PyTorch's compiler ---------------------------------------------------------------------------------------


def test_the_operations_are_opaque_to_the_compiler() -> None:
    case, options = long_case(torch.float32, length=300), {"fullgraph": True, "backend": "aot_eager"}
    given = [moved(x) for x in (case.queries, case.cache.keys, case.cache.pages, case.of, case.candidates, case.views)]

    def choose(scale: float) -> Tensor:
        return gpu.topk_tokens(*gpu.score_tokens(*given, scale), 32) + 7

    assert torch.equal(torch.compile(choose, **options)(0.2), choose(0.2))
    block = block_case(1, 300)
    bounds = torch.tensor([0, 1]), torch.tensor([0, 300])
    parts = [moved(x) for x in (block.queries, block.cache.keys, block.cache.values, block.cos, block.sin)]
    slots = moved(block.cache.pages.slots(0, torch.tensor(block.blocks[0][1])))

    def attend(queries: Tensor) -> Tensor:
        return gpu.sparse_attention(queries * 2, *parts[1:3], bounds[0], slots, bounds[1], *parts[3:], 0.125) + 1

    torch.testing.assert_close(torch.compile(attend, **options)(parts[0]), attend(parts[0]))


# -- what it needs ---------------------------------------------------------------------------------------------


def test_it_says_why_it_does_not_run_on_a_cpu() -> None:
    with pytest.raises(BackendUnavailable, match=r"'gpu' cannot run: it runs on NVIDIA and AMD GPUs, not on cpu"):
        find_backend("gpu", torch.device("cpu"), torch.float32, 64)


def test_it_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tokenselect[gpu]" in str(gpu.why_not(torch.device("cuda"), torch.float32, 64))


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, tokenselect, tokenselect.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="takes minutes of a GPU that compiles for itself")
@pytest.mark.parametrize("target", ["cuda 80", "cuda 90", "hip gfx942"])
def test_it_compiles_for_gpus_that_are_not_here(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_gpu.py")), *target.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for kernel in ("score_tiles", "reduce_rows", "sum_votes", "write_chosen", "attend_few", "attend_many"):
        assert f"{kernel}: shared" in done.stdout
