"""What a block attends is what the method says, and the Selection Cache loses nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.distances import num_clipped, run_rotations
from tokenselect.ops import reference
from tokenselect.ops.paging import PageTable
from tokenselect.ops.reference import rotate
from tokenselect.rotary import RotaryTable
from tokenselect.selection import (
    Block,
    SelectionState,
    block_starts,
    candidates_end,
    plan_selection,
    select_tokens,
)

HEADS, KV_HEADS, DIM, SCALE, MAX_DISTANCE = 6, 2, 16, 0.3, 50
CONFIG = TokenSelectConfig(
    num_sink_tokens=3,
    num_local_tokens=8,
    num_selected_tokens=10,
    block_size=6,
    distance_bucket_size=4,
    num_tail_tokens=0,
)
REUSE = CONFIG.replace(reuse_threshold=0.9)


def table(interleaved: bool = False, half: int = DIM // 2, factor: float = 1.0) -> RotaryTable:
    frequencies = 30.0 ** -(torch.arange(half).double() / half)
    angle = torch.arange(CONFIG.budget + 64)[:, None] * frequencies
    return RotaryTable(angle.cos().float(), angle.sin().float(), interleaved, factor)


class Counting:
    """The reference backend; counts how many blocks vote."""

    NAME = "counting"
    why_not = staticmethod(reference.why_not)
    pool_queries = staticmethod(reference.pool_queries)
    quantize_rows = staticmethod(reference.quantize_rows)
    topk_tokens = staticmethod(reference.topk_tokens)
    sparse_attention = staticmethod(reference.sparse_attention)

    def __init__(self) -> None:
        self.voted: list[int] = []

    def score_tokens(self, queries: Tensor, *args: Any) -> Any:
        self.voted.append(queries.shape[0])
        return reference.score_tokens(queries, *args)


@dataclass
class Layer:
    """One layer of a model, with the keys of some sequences, of which every one is as long."""

    config: TokenSelectConfig
    num_sequences: int = 1
    length: int = 90
    table: RotaryTable = field(default_factory=table)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.keys = torch.randn(self.num_sequences * self.length, KV_HEADS, DIM, generator=generator)
        self.pages = PageTable(torch.arange(self.num_sequences)[:, None], self.length, [0] * self.num_sequences)
        self.states = [SelectionState() for _ in range(self.num_sequences)]
        self.ops = Counting()

    def select(self, queries: Tensor, *blocks: Block) -> list[Tensor]:
        plan = plan_selection(blocks, self.config, self.table, MAX_DISTANCE)
        return select_tokens(queries, self.keys, self.pages, plan, self.states, self.config, self.ops, SCALE)

    def decode(self, position: int, query: Tensor) -> list[int]:
        """A step of the first sequence."""
        return self.select(query[None], Block(0, position, position + 1, 0))[0].tolist()


def random_queries(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


# -- blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "tail", "starts"),
    [
        (0, 20, 20, [0, 8, 16]),
        (0, 20, 18, [0, 8, 16, 18, 19]),
        (0, 16, 16, [0, 8]),
        (3, 20, 20, [3, 8, 16]),
        (8, 9, 9, [8]),
        (8, 9, 0, [8]),
        (5, 8, 100, [5]),
        (0, 4, 0, [0, 1, 2, 3]),
        (6, 12, 7, [6, 7, 8, 9, 10, 11]),
        (0, 4, -5, [0, 1, 2, 3]),
    ],
)
def test_blocks_begin_at_multiples_of_their_size(start: int, end: int, tail: int, starts: list[int]) -> None:
    assert block_starts(start, end, tail, 8) == starts


@pytest.mark.parametrize("size", [1, 5, 8])
def test_cutting_at_multiples_changes_no_block(size: int) -> None:
    for end in range(1, 40):
        for tail in (end, end - 3, 0):
            whole = block_starts(0, end, tail, size)
            for cut in range(size, end, size):
                assert block_starts(0, cut, tail, size) + block_starts(cut, end, tail, size) == whole


@pytest.mark.parametrize("size", [1, 5, 8])
def test_any_cut_changes_only_the_block_that_it_cuts(size: int) -> None:
    for end in range(1, 40):
        whole = block_starts(0, end, end, size)
        for cut in range(1, end):
            parts = block_starts(0, cut, end, size) + block_starts(cut, end, end, size)
            assert sorted({*whole, cut}) == parts


@pytest.mark.parametrize(("inside", "own", "end"), [(False, 6, 22), (True, 6, 28), (False, 1, 22), (True, 1, 23)])
def test_the_local_window_may_count_the_block_itself(inside: bool, own: int, end: int) -> None:
    config = CONFIG.replace(local_includes_block=inside)
    assert candidates_end(Block(0, 30, 30 + own, 0), config) == end


# -- what is chosen ------------------------------------------------------------------------------------------


def turned(vector: Tensor, distances: Tensor, of: RotaryTable) -> Tensor:
    """`vector` [Hq, D] at the mean rotation of `distances`."""
    angle = distances.double()[:, None] * of.frequencies
    return rotate(vector.double(), angle.cos().mean(0), angle.sin().mean(0), of.interleaved)


def run_of(token: int, first: int, start: int, config: TokenSelectConfig, max_distance: int) -> Tensor:
    """Distances from a block's start to the tokens of the run that holds `token`."""
    size = config.distance_bucket_size
    run = first + (token - first) // size * size
    distances = start - torch.arange(run, run + size).double()
    distances = distances - distances.min().clamp(max=0)
    return distances - (distances.mean() - max_distance).clamp(min=0)


def naive_choice(layer: Layer, queries: Tensor, block: Block) -> list[int]:
    """The method, word for word, token by token."""
    config, of = layer.config, layer.table
    keys = layer.keys[block.sequence * layer.length :][: layer.length].double()
    own = [turned(query, torch.tensor([i]), of) for i, query in enumerate(queries[block.queries])]
    pooled = torch.stack(own).mean(0)
    first, last = config.num_sink_tokens, candidates_end(block, config)
    begin, end = (0, block.start) if config.head_weights else (first, last)
    scale = SCALE * of.attention_factor**2 if config.scale_votes else 1.0
    total = torch.zeros(last - first, dtype=torch.float64)
    for view in ("position_free", "distance") if config.scoring == "mix" else (config.scoring,):
        logits = torch.empty(HEADS, end - begin, dtype=torch.float64)
        for token in range(begin, end):
            run, near = run_of(token, begin, block.start, config, MAX_DISTANCE), torch.tensor([config.num_local_tokens])
            at_one, at_own = turned(pooled, near, of), turned(pooled, run, of)
            both = config.position_free_weight * at_one + at_own
            query = {"position_free": at_one, "distance": at_own, "merged": both}[view]
            logits[:, token - begin] = scale * (query.view(KV_HEADS, -1, DIM) @ keys[token, :, :, None]).flatten()
        votes = logits.softmax(-1).sum(0)[first - begin : last - begin]
        total += votes / votes.sum()
    if config.vote_horizon:
        total += config.vote_prior
        total *= config.vote_horizon / (config.vote_horizon + last - torch.arange(first, last))
    reach = config.smoothing_window // 2
    smooth = [float(total[max(0, i - reach) : i + reach + 1].max()) for i in range(len(total))]
    best = sorted(range(len(total)), key=lambda i: (-smooth[i], i))[: config.num_selected_tokens]
    return [*range(first), *sorted(i + first for i in best), *range(last, block.end)]


CHANGES: dict[str, dict[str, Any]] = {
    "merged": {},
    "mix": {"scoring": "mix"},
    "all-alike": {"vote_horizon": 0},
    "near-first": {"vote_horizon": 2},
    "nothing-beforehand": {"vote_prior": 0.0},
    "much-beforehand": {"vote_prior": 0.5},
    "one-distance-once": {"position_free_weight": 1.0},
    "position_free": {"scoring": "position_free"},
    "distance": {"scoring": "distance"},
    "head-weights": {"head_weights": True},
    "head-weights-distance": {"head_weights": True, "scoring": "distance"},
    "unscaled": {"scale_votes": False},
    "smoothed": {"smoothing_window": 5},
    "wide-buckets": {"distance_bucket_size": 64},
    "no-local": {"num_local_tokens": 0},
    "no-sinks": {"num_sink_tokens": 0},
    "local-includes-block": {"local_includes_block": True},
    "with-cache": {"reuse_threshold": 0.9},
    "one-each": {"num_selected_tokens": 1},
}
BLOCKS = [
    Block(0, 25, 30, 0),
    Block(0, 30, 36, 5),
    Block(0, 60, 66, 11),
    Block(1, 84, 90, 17),
    Block(1, 70, 71, 23),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_choice_is_the_definition(changes: str) -> None:
    layer, queries = Layer(CONFIG.replace(**CHANGES[changes]), num_sequences=2), random_queries(24)
    ours = layer.select(queries, *BLOCKS)
    assert [part.tolist() for part in ours] == [naive_choice(layer, queries, block) for block in BLOCKS]
    assert {part.dtype for part in ours} == {torch.int64}


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("half", [8, 5], ids=["full", "partial"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_the_choice_uses_the_models_rotation(interleaved: bool, half: int, factor: float) -> None:
    layer, queries = (
        Layer(CONFIG, num_sequences=2, table=table(interleaved, half, factor)),
        random_queries(24),
    )
    ours = layer.select(queries, *BLOCKS)
    assert [part.tolist() for part in ours] == [naive_choice(layer, queries, block) for block in BLOCKS]


def test_blocks_do_not_depend_on_what_is_selected_with_them() -> None:
    layer, queries = Layer(CONFIG, num_sequences=2), random_queries(24)
    together = layer.select(queries, *BLOCKS)
    for block, expected in zip(BLOCKS, together, strict=True):
        assert torch.equal(layer.select(queries, block)[0], expected)


def test_the_choice_ignores_the_size_of_the_queries_batch() -> None:
    layer, queries = Layer(CONFIG), random_queries(24)
    noise = torch.full_like(queries, float("nan"))
    noise[5:11] = queries[5:11]
    assert torch.equal(layer.select(noise, BLOCKS[1])[0], layer.select(queries, BLOCKS[1])[0])


def test_a_plant_is_found() -> None:
    layer, queries = Layer(CONFIG.replace(scoring="position_free")), random_queries(6)
    block = Block(0, 66, 72, 0)
    wanted = sum(rotate(q, *layer.table.rotation(torch.tensor([8 + i]), torch.float32)) for i, q in enumerate(queries))
    layer.keys[31] = wanted.view(KV_HEADS, -1, DIM).mean(1)
    assert 31 in layer.select(queries, block)[0]


def test_nothing_selected_leaves_sinks_and_window() -> None:
    layer = Layer(CONFIG.replace(num_selected_tokens=0))
    chosen = layer.select(random_queries(6), Block(0, 30, 36, 0))[0]
    assert chosen.tolist() == [0, 1, 2, *range(22, 36)]
    assert layer.ops.voted == []


def test_the_first_block_beyond_the_limit_chooses() -> None:
    layer = Layer(CONFIG)
    chosen = layer.select(random_queries(6), Block(0, CONFIG.dense_limit + 1, CONFIG.dense_limit + 7, 0))[0]
    assert len(chosen) == CONFIG.dense_limit + 6  # one candidate less than there are
    assert len(set(chosen.tolist())) == len(chosen)


def test_what_is_attended_is_counted() -> None:
    layer = Layer(CONFIG)
    layer.select(random_queries(12), Block(0, 30, 36, 0), Block(0, 36, 42, 6))
    state = layer.states[0]
    assert (state.attended, state.available) == (6 * 2 * CONFIG.budget, 6 * (36 + 42))


@pytest.mark.parametrize("size", [6, 7, 64])
@pytest.mark.parametrize("scoring", ["distance", "merged"])
def test_runs_beyond_the_largest_distance_rotate_alike(size: int, scoring: Any) -> None:
    config = CONFIG.replace(scoring=scoring, distance_bucket_size=size)
    for start in range(size, 400, 13):
        nearest = (start - (size - 1) - torch.arange(-(-start // size)) * size).clamp(min=0)
        cos, sin = run_rotations(nearest, config, 100, table())
        count = int(num_clipped(torch.tensor(start - (size - 1)), size, 100))
        same = ((cos == cos[0]) & (sin == sin[0])).all(dim=1)
        assert int(same.long().cumprod(0).sum()) == max(count, 1)


# -- the Selection Cache -------------------------------------------------------------------------------------


def test_a_query_like_the_last_reuses_its_selection() -> None:
    layer, query = Layer(REUSE), random_queries(1)[0]
    first = layer.decode(40, query)
    second = layer.decode(41, query + 0.01 * random_queries(1, seed=2)[0])
    assert second == [*first, 41]  # the window reaches back to where it began
    assert (layer.states[0].lookups, layer.states[0].hits, layer.ops.voted) == (2, 1, [1])


def test_another_query_selects_again() -> None:
    layer = Layer(REUSE)
    for position in (40, 41, 42):
        query = random_queries(1, seed=position)
        block = Block(0, position, position + 1, 0)
        assert layer.decode(position, query[0]) == naive_choice(layer, query, block)
    assert (layer.states[0].lookups, layer.states[0].hits, layer.ops.voted) == (3, 0, [1, 1, 1])


@pytest.mark.parametrize(("cosine", "hits"), [(0.901, 1), (0.899, 0)])
@pytest.mark.parametrize("test", ["group_min", "flat"])
def test_the_threshold_is_a_cosine(test: str, cosine: float, hits: int) -> None:
    layer = Layer(REUSE.replace(reuse_test=test))
    then, other = torch.eye(DIM)[:2, None].expand(2, HEADS, DIM)
    layer.decode(40, then)
    layer.decode(41, 7.0 * (cosine * then + (1 - cosine**2) ** 0.5 * other))
    assert layer.states[0].hits == hits


@pytest.mark.parametrize(("test", "hits"), [("group_min", 0), ("flat", 1)])
def test_one_group_that_turns_away_is_enough_for_group_min(test: str, hits: int) -> None:
    layer = Layer(REUSE.replace(reuse_test=test))
    then = random_queries(1)[0]
    then[3:] *= 0.1
    now = then.clone()
    now[3:] *= -1  # the second KV head's queries, which are small
    layer.decode(40, then)
    layer.decode(41, now)
    assert layer.states[0].hits == hits


def test_the_cached_query_changes_only_when_selecting() -> None:
    layer, a = Layer(REUSE), torch.eye(DIM)[0].expand(HEADS, DIM)
    b = torch.eye(DIM)[1].expand(HEADS, DIM)
    for step, angle in enumerate((0.0, 0.3, 0.6)):  # cosines: .955 with the one before, .825 with the first
        turned_by = torch.tensor(angle)
        layer.decode(40 + step, turned_by.cos() * a + turned_by.sin() * b)
    assert (layer.states[0].hits, layer.ops.voted) == (1, [1, 1])


def test_without_it_nothing_is_looked_up_or_kept() -> None:
    layer, query = Layer(CONFIG), random_queries(1)[0]
    layer.decode(40, query)
    second = layer.decode(41, query)
    assert second == naive_choice(layer, query[None], Block(0, 41, 42, 0))
    assert (layer.states[0].lookups, layer.states[0].query) == (0, None)


def test_prompts_are_not_looked_up() -> None:
    layer, queries = Layer(REUSE), random_queries(1).expand(12, -1, -1)
    layer.select(queries, Block(0, 30, 36, 0), Block(0, 36, 42, 6))
    layer.select(queries[:2], Block(0, 42, 43, 0), Block(0, 43, 44, 1))  # a prompt's tail: two queries of one sequence
    assert layer.states[0].lookups == 0
    assert layer.ops.voted == [2, 2]


def test_the_first_step_may_reuse_the_prompts_last_selection() -> None:
    layer, query = Layer(REUSE), random_queries(1)
    prompt = layer.select(query.expand(2, -1, -1), Block(0, 42, 43, 0), Block(0, 43, 44, 1))[1].tolist()
    assert layer.decode(44, query[0]) == [*prompt, 44]


@pytest.mark.parametrize("config", [REUSE, REUSE.replace(local_includes_block=True)], ids=["apart", "inside"])
def test_a_selection_is_renewed_when_the_reach_doubles(config: TokenSelectConfig) -> None:
    layer, query = Layer(config), random_queries(1)[0]
    sizes = [len(layer.decode(40 + step, query)) for step in range(30)]
    fresh = config.num_sink_tokens + config.num_selected_tokens + config.num_local_tokens
    fresh += not config.local_includes_block
    steps = 2 * config.num_local_tokens - (fresh - config.num_sink_tokens - config.num_selected_tokens - 1)
    assert sizes[: steps + 1] == [*range(fresh, fresh + steps), fresh]
    assert sum(layer.ops.voted) == -(-30 // steps)
    assert max(sizes) <= config.budget


@pytest.mark.parametrize("local", [0, 1, 2, 5])
@pytest.mark.parametrize("block", [1, 3])
def test_reuse_never_exceeds_the_budget_or_loses_the_window(local: int, block: int) -> None:
    config = REUSE.replace(num_local_tokens=local, block_size=block)
    layer, query = Layer(config), random_queries(1)[0]
    last = layer.select(query.expand(block, -1, -1), Block(0, 30, 30 + block, 0))[0]
    for position in range(30 + block, 60):
        now = layer.decode(position, query)
        assert len(now) <= config.budget
        assert set(range(position - local, position + 1)) <= set(now)
        assert sorted(set(now)) == now
        assert len(last) <= config.budget


def test_sequences_decide_apart() -> None:
    both, alone = Layer(REUSE, num_sequences=2), Layer(REUSE, num_sequences=2)
    first, other = random_queries(2), random_queries(2, seed=2)
    other[0] = first[0]  # the first sequence's query stays, the second's changes
    for position, queries in ((40, first), (41, other)):
        blocks = [Block(row, position + row, position + row + 1, row) for row in range(2)]
        together = both.select(queries, *blocks)
        apart = [alone.select(queries, block)[0] for block in blocks]
        assert [part.tolist() for part in together] == [part.tolist() for part in apart]
    assert [(state.lookups, state.hits) for state in both.states] == [(2, 1), (2, 0)]
    assert both.ops.voted == [2, 1]


def test_a_step_reuses_beside_another_sequences_prompt() -> None:
    mixed, alone = Layer(REUSE, num_sequences=2), Layer(REUSE, num_sequences=2)
    query, prompt = random_queries(1), random_queries(6, seed=2)
    for layer in (mixed, alone):
        layer.decode(40, query[0])
    step, block = Block(0, 41, 42, 0), Block(1, 30, 36, 1)
    together = mixed.select(torch.cat((query, prompt)), step, block)
    apart = alone.select(query, step) + alone.select(torch.cat((query, prompt)), block)
    assert [part.tolist() for part in together] == [part.tolist() for part in apart]
    assert [(state.lookups, state.hits) for state in mixed.states] == [(2, 1), (0, 0)]
    assert mixed.ops.voted == [1, 1]


def test_all_hits_ask_nobody() -> None:
    layer, queries = Layer(REUSE, num_sequences=2), random_queries(2)
    for position in (40, 41):
        layer.select(queries, *(Block(row, position, position + 1, row) for row in range(2)))
    assert layer.ops.voted == [2]


def test_a_forgotten_selection_is_not_reused() -> None:
    layer, query = Layer(REUSE), random_queries(1)[0]
    layer.decode(40, query)
    layer.states[0].forget()
    layer.decode(41, query)
    assert (layer.states[0].hits, layer.ops.voted) == (0, [1, 1])
