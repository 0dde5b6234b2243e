"""The definition itself, against naive loops, `torch.topk` and `scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from cases import (
    HEADS,
    LAYOUTS,
    TOLERANCE,
    Sparse,
    Votes,
    angles,
    naive_rotate,
    sequences_of,
    shapes,
    sparse_case,
    views_of,
    votes_case,
)
from torch.nn.functional import scaled_dot_product_attention

from tokenselect.ops import BACKENDS, BackendUnavailable, find_backend
from tokenselect.ops.reference import (
    Distances,
    causal_attention,
    gather_rows,
    rotate,
    topk_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

# -- paged caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_find_every_token(layout: str) -> None:
    sequences = sequences_of([37, 5, 50], 3, 8, torch.float32)
    cache = LAYOUTS[layout](sequences)
    for i, (keys, values) in enumerate(sequences):
        positions = torch.randperm(len(keys))
        assert torch.equal(cache.keys[cache.pages.slots(i, positions)], keys[positions])
        for start, end in [(0, len(keys)), (2, 3), (1, len(keys) - 1), (4, 4)]:
            assert torch.equal(cache.pages.rows(cache.values, i, start, end), values[start:end])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 3])
def test_gathered_rows_are_the_tokens(layout: str, heads: int) -> None:
    sequences = sequences_of([20, 31], heads, 8, torch.float32)
    cache = LAYOUTS[layout](sequences)
    for i, (keys, _) in enumerate(sequences):
        positions = torch.tensor([0, 3, 17, 18])
        rows = gather_rows(cache.keys, cache.pages.slots(i, positions))
        assert torch.equal(rows, keys[positions].transpose(0, 1))


# -- rotation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("dim", "half"), [(8, 4), (80, 40), (80, 10), (6, 1)])
def test_rotate_turns_pairs(dim: int, half: int, interleaved: bool) -> None:
    x, (cos, sin) = torch.randn(3, 9, dim), angles(9, half)
    expected = naive_rotate(x, cos, sin, interleaved)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [4, 3], ids=["full", "partial"])
def test_rotate_broadcasts_one_vector_over_many_rotations(half: int, interleaved: bool) -> None:
    x, (cos, sin) = torch.randn(2, 1, 8), angles(9, half)
    expected = torch.stack([naive_rotate(x[:, 0], cos[i], sin[i], interleaved) for i in range(9)], dim=1)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved).double(), expected, atol=1e-5, rtol=0)


# -- score_tokens --------------------------------------------------------------------------------------------


def naive_votes(case: Votes) -> list[Tensor]:
    """Token by token: rotate the query for the token's run, take its logit, then a softmax per head."""
    out = []
    for block, sequence in enumerate(case.of.tolist()):
        keys = case.sequences[sequence][0].double()
        first, last = (case.candidates if case.context is None else case.context)[block].tolist()
        begin, end = case.candidates[block].tolist()
        group = case.queries.shape[1] // keys.shape[1]
        total = torch.zeros(end - begin, dtype=torch.float64)
        for view in case.views:
            logits = torch.empty(case.queries.shape[1], last - first, dtype=torch.float64)
            runs = int(view.run_start_loc[block + 1] - view.run_start_loc[block])
            for t in range(last - first):
                run = int(view.run_start_loc[block]) + (0 if runs == 1 else t // view.run_size)
                for head in range(case.queries.shape[1]):
                    turned = naive_rotate(case.queries[block, head], view.cos[run], view.sin[run], view.interleaved)
                    logits[head, t] = case.scale * turned @ keys[first + t, head // group]
            votes = logits.softmax(-1).sum(0)[begin - first : end - first]
            total += votes / votes.sum()
        if case.horizon:
            total += case.prior
            total *= torch.tensor([case.horizon / (case.horizon + end - t) for t in range(begin, end)])
        out.append(total)
    return out


def check_votes(case: Votes) -> None:
    votes, start_loc = case.score()
    expected = naive_votes(case)
    assert start_loc.tolist() == [0, *torch.tensor([len(part) for part in expected]).cumsum(0).tolist()]
    torch.testing.assert_close(votes.double(), torch.cat(expected), atol=1e-5, rtol=0)
    assert votes.dtype == torch.float32


@pytest.mark.parametrize("scoring", ["position_free", "distance", "mix"])
@pytest.mark.parametrize("context", [False, True], ids=["candidates", "context"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_votes_equal_a_loop_over_tokens(layout: str, context: bool, scoring: str) -> None:
    check_votes(votes_case(layout, scoring=scoring, context=context))


@pytest.mark.parametrize("horizon", [1.0, 20.0])
@pytest.mark.parametrize("prior", [0.0, 0.05])
def test_votes_count_less_by_age(horizon: float, prior: float) -> None:
    check_votes(votes_case(context=True, horizon=horizon, prior=prior))


def test_a_prior_without_a_horizon_changes_nothing() -> None:
    case = votes_case()
    assert torch.equal(replace(case, prior=0.05).score()[0], case.score()[0])


@pytest.mark.parametrize("heads", HEADS, ids=shapes)
def test_votes_of_every_group_size(heads: tuple[int, int]) -> None:
    check_votes(votes_case(heads=heads))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5], ids=["full", "partial"])
def test_votes_in_every_rotary_layout(half: int, interleaved: bool) -> None:
    check_votes(votes_case(half=half, interleaved=interleaved))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=shapes)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_votes_read_keys_of_any_type_and_size(dim: int, dtype: torch.dtype) -> None:
    check_votes(votes_case("padded", (2, 1), dim, half=dim // 2, dtype=dtype))


def test_votes_of_more_blocks_than_are_scored_together() -> None:
    case = votes_case(scoring="position_free")
    case.of = torch.ones(40, dtype=torch.int64)
    case.candidates = torch.stack((torch.full((40,), 3), torch.arange(8, 48)), dim=1)
    case.queries = torch.randn(40, 6, 16)
    case.views = views_of("mix", list(range(5, 45)), 8, False)
    check_votes(case)


def test_blocks_of_one_sequence_may_begin_at_different_candidates() -> None:
    case = votes_case()
    case.candidates = torch.tensor([[3, 30], [6, 23], [2, 24], [9, 53]])
    case.views = views_of("mix", [27, 17, 22, 44], 8, False)
    check_votes(case)


@pytest.mark.parametrize("scoring", ["position_free", "mix"])
def test_votes_of_a_block_sum_to_the_number_of_views(scoring: str) -> None:
    case = votes_case(scoring=scoring)
    votes, start_loc = case.score()
    sums = [float(votes[a:b].sum()) for a, b in pairwise(start_loc.tolist())]
    assert sums == pytest.approx([len(case.views)] * 4, abs=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_votes_are_numbers_when_every_head_looks_at_the_sinks(size: float) -> None:
    case = votes_case("strided", (2, 1), scoring="position_free", context=True)
    case.queries = torch.ones_like(case.queries)
    case.views = [Distances(torch.ones(4, 8), torch.zeros(4, 8), 1, torch.arange(5))]
    for row in case.cache.pages.slots(0, torch.arange(3)), case.cache.pages.slots(1, torch.arange(3)):
        case.cache.keys[row] = size
    votes, _ = case.score()
    assert votes.isfinite().all()
    assert (votes >= 0).all()


# -- topk_tokens ---------------------------------------------------------------------------------------------


def naive_topk(votes: Tensor, k: int) -> list[int]:
    return sorted(sorted(range(len(votes)), key=lambda i: (-float(votes[i]), i))[:k])


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("k", [1, 7, 32, 50])
def test_topk_prefers_the_lowest_index_in_ties(levels: int, k: int) -> None:
    lengths = [50, 51, 97]
    votes = torch.randint(levels, (sum(lengths),)) / levels
    start_loc = torch.tensor([0, *lengths]).cumsum(0)
    chosen = topk_tokens(votes, start_loc, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [naive_topk(part, k) for part in votes.split(lengths)]


@pytest.mark.parametrize("k", [1, 100, 2048])
def test_topk_without_ties_is_torch_topk(k: int) -> None:
    votes = torch.randperm(5000) / 5000
    assert torch.equal(topk_tokens(votes, torch.tensor([0, 5000]), k)[0], votes.topk(k).indices.sort().values)


def test_topk_of_votes_that_vanish() -> None:
    votes = torch.zeros(20)
    votes[[4, 11]] = torch.tensor([1e-45, 1e-38])
    assert topk_tokens(votes, torch.tensor([0, 20]), 4).tolist() == [[0, 1, 4, 11]]


# -- sparse_attention ----------------------------------------------------------------------------------------


def by_sdpa(case: Sparse) -> Tensor:
    """Gather, rotate at re-indexed positions, and let torch attend; no soft cap, no sink logits."""
    out, row, interleaved = [], 0, bool(case.options.get("interleaved"))
    for sequence, positions, own in case.blocks:
        keys, values = (part[positions].transpose(0, 1).double() for part in case.sequences[sequence])
        n = len(positions)
        queries = case.queries[row : row + own].transpose(0, 1)
        queries = naive_rotate(queries, case.cos[n - own : n], case.sin[n - own : n], interleaved)
        keys = naive_rotate(keys, case.cos[:n], case.sin[:n], interleaved)
        mask = torch.ones(own, n, dtype=torch.bool).tril(n - own)
        attended = scaled_dot_product_attention(
            queries[None], keys[None], values[None], mask, scale=case.scale, enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
        row += own
    return torch.cat(out)


def check_attention(case: Sparse, expected: Tensor | None = None) -> None:
    out = case.run()
    assert out.dtype == case.queries.dtype
    atol = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), by_sdpa(case) if expected is None else expected, atol=atol, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=shapes)
def test_attention_equals_sdpa_over_gathered_tokens(layout: str, dtype: torch.dtype) -> None:
    check_attention(sparse_case(layout, dtype=dtype))


@pytest.mark.parametrize("heads", HEADS, ids=shapes)
@pytest.mark.parametrize("layout", ["page1", "padded"])
def test_attention_of_every_group_size(layout: str, heads: tuple[int, int]) -> None:
    check_attention(sparse_case(layout, heads))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=shapes)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_attention_of_every_head_size(dim: int, dtype: torch.dtype) -> None:
    case = sparse_case("strided", (4, 1), dim, dtype)
    case.scale = dim**-0.5
    check_attention(case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("half", [8, 5, 2], ids=lambda half: f"rotary{2 * half}of16")
def test_attention_in_every_rotary_layout(half: int, interleaved: bool) -> None:
    check_attention(sparse_case(half=half, interleaved=interleaved))


def with_extras(case: Sparse, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Query by query, head by head."""
    out, row = torch.empty_like(case.queries, dtype=torch.float64), 0
    for sequence, positions, own in case.blocks:
        keys, values = (part[positions].double() for part in case.sequences[sequence])
        for i in range(own):
            seen = len(positions) - own + i + 1
            turned = naive_rotate(keys[:seen].transpose(0, 1), case.cos[:seen], case.sin[:seen])
            for head in range(case.queries.shape[1]):
                kv = head // (case.queries.shape[1] // keys.shape[1])
                query = naive_rotate(case.queries[row, head], case.cos[seen - 1], case.sin[seen - 1])
                logits = turned[kv] @ query * case.scale
                if softcap:
                    logits = softcap * (logits / softcap).tanh()
                if sinks is not None:
                    logits = torch.cat((logits, sinks[head : head + 1].double()))
                out[row, head] = logits.softmax(0)[:seen] @ values[:seen, kv]
            row += 1
    return out


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 0.7, 3.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=shapes)
def test_attention_honours_soft_cap_and_sink_logits(dtype: torch.dtype, softcap: float | None, sinks: bool) -> None:
    learned = torch.randn(6) * 3 if sinks else None
    case = sparse_case(dtype=dtype, softcap=softcap, sink_logits=learned)
    case.scale = 0.4
    check_attention(case, with_extras(case, softcap, learned))


def test_queries_of_no_block_get_zeros() -> None:
    case = sparse_case()
    case.queries = torch.cat((case.queries, torch.full((2, 6, 16), float("nan"))))
    out = case.run()
    assert torch.equal(out[22:], torch.zeros(2, 6, 16))
    assert out.isfinite().all()


def test_causal_attention_is_sdpa_over_the_last_queries() -> None:
    q, k, v = torch.randn(6, 5, 16), torch.randn(2, 23, 16), torch.randn(2, 23, 16)
    mask = torch.ones(5, 23, dtype=torch.bool).tril(18)
    expected = scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=1.0, enable_gqa=True)[0]
    torch.testing.assert_close(causal_attention(q, k, v), expected, atol=TOLERANCE[torch.float32], rtol=0)


# -- the choice of a backend ---------------------------------------------------------------------------------


def test_auto_finds_a_backend_that_can_run() -> None:
    backend = find_backend("auto", torch.device("cpu"), torch.float32, 64)
    assert backend.why_not(torch.device("cpu"), torch.float32, 64) is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of auto, .*reference.* got 'fast'$"):
        find_backend("fast", torch.device("cpu"), torch.float32, 64)


def test_a_backend_asked_for_by_name_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["reference"], "why_not", lambda *_: "no such luck")
    with pytest.raises(BackendUnavailable, match=r"'reference' cannot run: no such luck; use backend='auto'"):
        find_backend("reference", torch.device("cpu"), torch.float32, 64)
