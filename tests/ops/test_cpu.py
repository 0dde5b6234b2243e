"""The native kernels, on every instruction set that this processor runs, against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import HEADS, LAYOUTS, Sparse, Votes, angles, paged, sequences_of, shapes, sparse_case, votes_case
from torch import Tensor

from tokenselect.ops import cpu, reference
from tokenselect.ops.paging import PageTable

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=f"native kernels: {cpu.why_missing()}")

SETS = [] if cpu.why_missing() else cpu.instruction_sets()
# Votes add up to 2 a block, and exponentials of 16-bit keys are kept in half precision. The reference computes
# attention in the dtype of its inputs, the kernels in float32: they differ by what the reference rounds.
VOTES = 2e-4
HAVE_BYTE_PRODUCTS = ("avx512", "avx512_bf16", "amx")  # there queries of an int8 copy are rounded to 8 bits
ATTENTION = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@pytest.fixture(params=SETS, autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    cpu.use_instruction_set(request.param)
    yield
    cpu.use_instruction_set("auto")


def check_votes(case: Votes) -> None:
    (ours, ours_at), (theirs, theirs_at) = case.score(cpu), case.score()
    assert torch.equal(ours_at, theirs_at)
    torch.testing.assert_close(ours, theirs, atol=VOTES, rtol=rounding(case))


def rounding(case: Votes) -> float:
    """How far a vote may be off, relative to it: AVX512-BF16 multiplies bf16 keys by queries that it rounds to bf16."""
    return 3e-2 if case.cache.keys.dtype == torch.bfloat16 and cpu.instruction_set() in ("avx512_bf16", "amx") else 0


def check_attention(case: Sparse) -> None:
    ours, theirs = case.run(cpu), case.run()
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=ATTENTION[ours.dtype], rtol=0)


def test_the_instruction_set_asked_for_runs() -> None:
    for name in SETS:
        cpu.use_instruction_set(name)
        assert cpu.instruction_set() == name
    with pytest.raises(ValueError, match=r"^instruction set must be one of auto, .*portable, got 'abacus'$"):
        cpu.use_instruction_set("abacus")


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
    assert torch.equal(replace(case, prior=0.05).score(cpu)[0], case.score(cpu)[0])


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 256])
def test_votes_of_every_head_size(dim: int, dtype: torch.dtype) -> None:
    check_votes(votes_case(dim=dim, dtype=dtype, context=True))


@pytest.mark.parametrize("heads", [*HEADS, (16, 1), (14, 2)], ids=shapes)
def test_votes_of_every_group_size(heads: tuple[int, int]) -> None:
    check_votes(votes_case(heads=heads))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5, 2])
def test_votes_in_every_rotary_layout(half: int, interleaved: bool) -> None:
    check_votes(votes_case(half=half, interleaved=interleaved))


def int8_copy(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and their scale by token and head."""
    scales = rows.abs().amax(-1).clamp(min=1e-9) / 127
    return (rows / scales[..., None]).round().to(torch.int8), scales


def long_case(dtype: torch.dtype, length: int = 3000, page_size: int = 16) -> Votes:
    """Several chunks of keys, so that their sums meet."""
    case = votes_case("page16", heads=(9, 3), dim=64, half=32, dtype=dtype)
    sequences = sequences_of([length], 3, 64, dtype)
    candidates = torch.tensor([[7, length - 50]])
    cos, sin = angles(length // 4, 32)
    views = [
        replace(view, cos=cos[:runs], sin=sin[:runs], run_start_loc=torch.tensor([0, runs]))
        for view, runs in zip(case.views, (1, length // 4), strict=True)
    ]
    cache = paged(sequences, page_size)
    return Votes(cache, sequences, case.queries[:1], torch.tensor([0]), candidates, None, views, 64**-0.5)


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
def test_votes_over_many_chunks(dtype: torch.dtype) -> None:
    case = long_case(dtype)
    ours, theirs = case.score(cpu)[0], case.score()[0]
    # A vote is a share of 2 over 3,000 tokens: what counts is the error next to the vote. AVX512-BF16 rounds queries.
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("horizon", [30.0, 512.0])
def test_votes_of_many_chunks_count_less_by_age(horizon: float) -> None:
    case = replace(long_case(torch.float32), horizon=horizon, prior=1e-4)
    torch.testing.assert_close(case.score(cpu)[0], case.score()[0], atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("page_size", [1, 100, 256, 700, 4000])
def test_votes_over_pages_of_any_size(page_size: int) -> None:
    """Pages that divide the kernels' chunks of keys, that do not, and one page."""
    case = long_case(torch.float32, page_size=page_size)
    torch.testing.assert_close(case.score(cpu)[0], case.score()[0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("alike", [0, 1, 5, 255, 256, 257, 749, 750])
def test_runs_that_are_alike_count_as_one(alike: int) -> None:
    """Within a chunk, at its border, beyond it, and all of them: the same bits as run by run."""
    case = long_case(torch.bfloat16)
    free, runs = case.views
    for part in (runs.cos, runs.sin):
        part[:alike] = part[max(alike - 1, 0)].clone()
    runwise = case.score(cpu)[0]
    case.views = [free, replace(runs, alike=torch.tensor([alike]))]
    assert torch.equal(case.score(cpu)[0], runwise)


def test_blocks_of_which_fewer_runs_are_alike() -> None:
    """Blocks that share a read of the keys take what is alike for all of them."""
    case = tail_case(3, 3000)
    free, runs = case.views
    first = runs.run_start_loc.tolist()
    counts = [700, 20, 300]
    for start, count in zip(first, counts, strict=False):
        for part in (runs.cos, runs.sin):
            part[start : start + count] = part[start].clone()
    runwise = case.score(cpu)[0]
    case.views = [free, replace(runs, alike=torch.tensor(counts))]
    assert torch.equal(case.score(cpu)[0], runwise)


@pytest.mark.parametrize("dtype", [*ATTENTION, torch.int8], ids=shapes)
def test_equal_keys_have_equal_votes(dtype: torch.dtype) -> None:
    """Wherever they are: rounding breaks no tie, so that the first of them is chosen."""
    case = long_case(torch.float32)
    keys = torch.randn(50, 3, 64).repeat(60, 1, 1)  # 3,000 tokens, several chunks
    keys[700] *= 3  # one chunk has a larger maximum than others
    scales = None
    if dtype == torch.int8:
        keys, scales = int8_copy(keys)
    pages = PageTable(torch.zeros(1, 1, dtype=torch.int64), 3000, [0])
    given = case.queries, keys.to(dtype), pages, case.of, torch.tensor([[50, 3000]]), case.views[:1], 0.1, None, scales
    votes = cpu.score_tokens(*given)[0].view(59, 50)
    votes[650 // 50, 0] = votes[0, 0]  # that one
    assert torch.equal(votes, votes[:1].expand(59, 50))


def tail_case(blocks: int, length: int) -> Votes:
    """The tail of a prompt: one query a block, each sees one token more."""
    case = long_case(torch.float32, length, 256)
    ends = torch.arange(length - 50 - blocks, length - 50)[:, None]
    candidates = torch.cat((torch.full_like(ends, 4), ends), dim=1)
    of, queries = torch.zeros(blocks, dtype=torch.int64), torch.randn(blocks, 9, 64)
    counts = torch.tensor([[1] * blocks, (-(-(candidates[:, 1] - 4) // 4)).tolist()])
    views = []
    for view, runs in zip(case.views, counts, strict=True):
        angle = torch.rand(int(runs.sum()), 32) * 6
        start_loc = torch.nn.functional.pad(runs.cumsum(0), (1, 0))
        views.append(replace(view, cos=angle.cos(), sin=angle.sin(), run_start_loc=start_loc))
    return Votes(case.cache, case.sequences, queries, of, candidates, None, views, 0.125)


@pytest.mark.parametrize(("blocks", "length"), [(40, 700), (16, 30_000)], ids=["many", "long"])
def test_votes_of_blocks_that_share_their_keys(blocks: int, length: int) -> None:
    """More blocks, and more exponentials, than are kept at once."""
    case = tail_case(blocks, length)
    torch.testing.assert_close(case.score(cpu)[0], case.score()[0], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layout", ["page1", "page16", "padded"])
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("context", [False, True], ids=["", "context"])
def test_votes_by_an_int8_copy(layout: str, dim: int, context: bool) -> None:
    case = replace(votes_case(layout, dim=dim, context=context), scale=dim**-0.5)
    check_int8_votes(case, VOTES, 8e-2 if cpu.instruction_set() in HAVE_BYTE_PRODUCTS else 0)


@pytest.mark.parametrize("layout", ["page1", "page16", "padded"])
@pytest.mark.parametrize("dim", [16, 64, 80, 192, 256])
def test_integer_queries_meet_an_int8_copy_exactly(layout: str, dim: int) -> None:
    """Queries that 8 bits hold, in rotations by nothing, by a right angle and to double the length."""
    case = votes_case(layout, dim=dim, half=8)
    queries = torch.randint(-60, 61, case.queries.shape).float()
    queries[..., 3], queries[..., 11] = 127, 0  # a pair in half rotary layout
    turns = torch.randint(0, 4, case.views[1].cos.shape) * (torch.pi / 2)
    views = [replace(view, cos=view.cos.clone(), sin=view.sin.clone()) for view in case.views]
    views[0].cos.fill_(1), views[0].sin.fill_(0)
    views[1].cos.copy_(turns.cos().round()), views[1].sin.copy_(turns.sin().round())
    check_int8_votes(replace(case, queries=queries, views=views, scale=1 / 127 / dim**0.5), 2e-6, 1e-3)
    queries[..., 16:] = 0  # what is not rotated is not doubled
    doubled = [replace(view, cos=2 * view.cos, sin=2 * view.sin) for view in views]
    check_int8_votes(replace(case, queries=queries, views=doubled, scale=1 / 127 / dim**0.5), 2e-6, 1e-3)


def check_int8_votes(case: Votes, atol: float, rtol: float) -> None:
    case.cache.keys.nan_to_num_(3.0)
    keys, scales = int8_copy(case.cache.keys)
    given = (case.queries, keys, case.cache.pages, case.of, case.candidates, case.views, case.scale, case.context)
    ours, theirs = (ops.score_tokens(*given, scales)[0] for ops in (cpu, reference))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


# -- the most votes --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[int], Tensor]] = {
    "random": torch.rand,
    "equal": torch.ones,
    "zero": torch.zeros,
    "ties": lambda n: torch.randint(0, 7, (n,)) / 7,
    "tiny": lambda n: torch.rand(n) * 1e-40,
    "wide": lambda n: torch.exp(torch.randn(n) * 30),
    "infinite": lambda n: torch.where(torch.rand(n) < 0.1, float("inf"), torch.rand(n)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "k"), [(1, 1), (7, 7), (1000, 1), (70_001, 2048), (70_001, 70_000)])
def test_topk_is_exact_and_prefers_the_lowest_index(kind: str, count: int, k: int) -> None:
    votes, start_loc = KINDS[kind](count), torch.tensor([0, count])
    assert torch.equal(cpu.topk_tokens(votes, start_loc, k), reference.topk_tokens(votes, start_loc, k))


def test_topk_of_millions() -> None:
    count = 4_000_000
    votes, start_loc = torch.randint(0, 1 << 20, (count,)).float(), torch.tensor([0, count])
    assert torch.equal(cpu.topk_tokens(votes, start_loc, 2048), reference.topk_tokens(votes, start_loc, 2048))


def test_topk_of_a_ragged_batch() -> None:
    votes, start_loc = torch.rand(600), torch.tensor([0, 64, 100, 600])
    assert torch.equal(cpu.topk_tokens(votes, start_loc, 33), reference.topk_tokens(votes, start_loc, 33))


# -- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
def test_attention(layout: str, dtype: torch.dtype) -> None:
    check_attention(sparse_case(layout, dtype=dtype))


@pytest.mark.parametrize("heads", [*HEADS, (16, 1), (14, 2)], ids=shapes)
def test_attention_of_every_group_size(heads: tuple[int, int]) -> None:
    check_attention(sparse_case(heads=heads))


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 256])
def test_attention_of_every_head_size(dim: int, dtype: torch.dtype) -> None:
    case = sparse_case("strided", (4, 1), dim, dtype)
    case.scale = dim**-0.5
    check_attention(case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5, 2])
def test_attention_in_every_rotary_layout(half: int, interleaved: bool) -> None:
    check_attention(sparse_case(half=half, interleaved=interleaved))


@pytest.mark.parametrize("softcap", [None, 0.7, 50.0])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_attention_with_soft_cap_and_sink_logits(softcap: float | None, sinks: bool) -> None:
    check_attention(sparse_case(softcap=softcap, sink_logits=torch.randn(6) * 3 if sinks else None))


def block_case(own: int, length: int, dtype: torch.dtype = torch.float32) -> Sparse:
    """One block of `own` queries over `length` of 4,000 tokens."""
    sequences = sequences_of([4000], 3, 64, dtype)
    positions = torch.randperm(4000)[:length].sort().values.tolist()
    cos, sin = angles(length, 32)
    queries = torch.randn(own, 9, 64).to(dtype)
    return Sparse(sequences, paged(sequences, 16), queries, [(0, positions, own)], cos, sin, {}, 0.125)


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize(("own", "length"), [(1, 1), (1, 2688), (3, 129), (6, 700), (200, 200), (257, 1300)])
def test_attention_of_blocks_of_any_size(own: int, length: int, dtype: torch.dtype) -> None:
    check_attention(block_case(own, length, dtype))


@pytest.mark.parametrize("dtype", ATTENTION, ids=shapes)
@pytest.mark.parametrize("sink", [None, -30.0, 25.0])
@pytest.mark.parametrize(("first", "last"), [(-20, 40), (40, -20), (0, 200)], ids=shapes)
def test_attention_whose_logits_grow_or_fall(dtype: torch.dtype, sink: float | None, first: int, last: int) -> None:
    """What was summed before a larger logit came must count for less after it, within a chunk and between chunks."""
    case = block_case(60, 700, dtype)
    case.cos, case.sin = torch.ones_like(case.cos), torch.zeros_like(case.sin)
    case.queries = torch.zeros_like(case.queries)
    case.queries[..., 0] = 8.0  # the scale is 1 / 8: a key's first number is its logit
    case.queries[..., 1] = torch.randn(60, 9)
    steps = torch.linspace(first, last, 700).to(dtype)
    keys = case.cache.keys
    rows = case.cache.pages.slots(0, torch.tensor(case.blocks[0][1]))
    keys[rows, :, 0] = steps[:, None]
    case.options = {"sink_logits": None if sink is None else torch.full((9,), sink)}
    ours = case.run(cpu)
    case.queries, case.cache.keys, case.cache.values = case.queries.float(), keys.float(), case.cache.values.float()
    torch.testing.assert_close(ours.float(), case.run(), atol=ATTENTION[dtype], rtol=0)


def test_queries_of_no_block_get_zeros() -> None:
    case = sparse_case()
    case.queries = torch.cat((case.queries, torch.full((2, 6, 16), float("nan"))))
    assert torch.equal(case.run(cpu)[22:], torch.zeros(2, 6, 16))


# -- threads and PyTorch ---------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    votes, step, block = long_case(torch.float32), block_case(1, 2688), block_case(257, 1300)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            chosen = cpu.topk_tokens(votes.score(cpu)[0], torch.tensor([0, 2943]), 256)
            made.append((chosen, step.run(cpu), block.run(cpu)))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert torch.equal(made[0][0], other[0])
        assert torch.equal(made[0][1], other[1])
        assert torch.equal(made[0][2], other[2])


def test_several_python_threads_may_call_at_once() -> None:
    """Each in its own dtype and size, so that memory which they shared would show."""
    votes = [long_case(dtype, 1500 + 500 * i) for i, dtype in enumerate(ATTENTION)]
    sizes = [(1, 900), (65, 300), (200, 700)]
    blocks = [block_case(*size, dtype) for size, dtype in zip(sizes, ATTENTION, strict=True)]
    expected = [(vote.score(cpu)[0], block.run(cpu)) for vote, block in zip(votes, blocks, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: (votes[i % 3].score(cpu)[0], blocks[i % 3].run(cpu)), range(24)))
    for i, ours in enumerate(made):
        torch.testing.assert_close(ours, expected[i % 3], atol=1e-6, rtol=0)
