"""Variants compute what they are named for, and the grid holds every setting that ablations speak of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_case import HEADS, KV_HEADS, SCALE, SMALL, Layer, middle

from benchmarks.variants.choices import TopP, select_with_prior
from benchmarks.variants.grid import OURS, variants
from benchmarks.variants.queries import LowFrequencies, ModuloHeads
from benchmarks.variants.votes import (
    OtherVotes,
    Vote,
    largest_share,
    one_head_one_vote,
    root_of_shares,
    sum_of_logits,
)
from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Choice
from tokenselect.ops import reference
from tokenselect.ops.paging import PageTable
from tokenselect.selection import Block

EXACT = SMALL.replace(score_dtype="same")
Score = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def scored(score: Score, scoring: str = "mix", *starts: int) -> torch.Tensor:
    layer = Layer(Choice(), EXACT.replace(scoring=scoring))
    starts = starts or (200, 213)
    plan = layer.plan(*(Block(0, start, start + 1, row) for row, start in enumerate(starts)))
    pooled = torch.randn(len(starts), HEADS, 16, generator=torch.Generator().manual_seed(7))
    votes, start_loc = score(
        pooled,
        layer.keys,
        layer.pages,
        plan.sequences,
        plan.candidates,
        plan.distances,
        SCALE,
        plan.context,
        None,
        None,
        50.0,
    )
    assert start_loc.tolist()[-1] == len(votes)
    return votes


@pytest.mark.parametrize("scoring", ["merged", "mix", "position_free", "distance"])
def test_the_soft_vote_is_that_of_the_definition(scoring: str) -> None:
    soft = OtherVotes(reference, lambda logits: logits.softmax(-1).sum(0))  # type: ignore[arg-type]
    torch.testing.assert_close(scored(soft.score_tokens, scoring), scored(reference.score_tokens, scoring))


@pytest.mark.parametrize(
    ("vote", "expected"),
    [
        (sum_of_logits, [4.0, 2.0, 0.0, 1.0]),
        (lambda logits: one_head_one_vote(logits, 2), [2.0, 1.0, 0.0, 1.0]),
        (lambda logits: one_head_one_vote(logits, 9), [2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_votes_by_hand(vote: Vote, expected: list[float]) -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0], [1.0, 0.0, 0.0, 2.0]])
    assert vote(logits).tolist() == expected


def test_votes_of_shares() -> None:
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    torch.testing.assert_close(largest_share(shares.log()), torch.tensor([0.7, 0.3, 0.6]))
    torch.testing.assert_close(root_of_shares(shares.log()), shares.sqrt().sum(0))


def test_modulo_heads_are_scored_by_other_keys() -> None:
    layer = Layer(Choice())
    pages, pooled = PageTable(torch.zeros(1, 1, dtype=torch.int64), 400, [0]), torch.randn(1, HEADS, 16)
    plan = Layer(Choice(), EXACT.replace(scoring="position_free")).plan(Block(0, 100, 101, 0))
    rest = (pages, plan.sequences, plan.candidates, plan.distances, SCALE)
    found, _ = ModuloHeads(reference).score_tokens(pooled, layer.keys, *rest)  # type: ignore[arg-type]
    # The same keys, one key head for each query head.
    wide = layer.keys[:, [head % KV_HEADS for head in range(HEADS)]]
    expected, _ = reference.score_tokens(pooled, wide, *rest)
    torch.testing.assert_close(found, expected)


def test_low_frequencies_ignore_the_fast_dimensions() -> None:
    layer, pooled = Layer(Choice()), torch.randn(1, HEADS, 16)
    plan = layer.plan(Block(0, 100, 101, 0))
    rest = (layer.pages, plan.sequences, plan.candidates, plan.distances, SCALE)
    slow = LowFrequencies(reference)  # type: ignore[arg-type]
    found, _ = slow.score_tokens(pooled, layer.keys, *rest)
    changed = layer.keys.clone()
    changed[..., [0, 1, 2, 3, 8, 9, 10, 11]] = 5.0
    torch.testing.assert_close(slow.score_tokens(pooled, changed, *rest)[0], found)
    changed[..., 4] = 5.0
    assert not torch.allclose(slow.score_tokens(pooled, changed, *rest)[0], found)


def test_top_p_keeps_the_best_of_the_choice() -> None:
    whole = Layer(Choice(), EXACT).select((200, 208), (208, 216))
    part = Layer(Choice(select=TopP(0.05)), EXACT).select((200, 208), (208, 216))
    every = Layer(Choice(select=TopP(1.0)), EXACT).select((200, 208), (208, 216))
    assert every == whole
    for some, start, all_of_it in zip(part, (200, 208), whole, strict=True):
        kept = middle(some, start)
        assert 0 < len(kept) < 32
        assert set(kept) < set(middle(all_of_it, start))
        assert some[-8:] == all_of_it[-8:]


def test_a_prior_changes_later_blocks_alone() -> None:
    plain, prior = Layer(Choice(), EXACT), Layer(Choice(select=select_with_prior), EXACT)
    spans = [(200, 208), (208, 216)]
    without, found = plain.select(*spans), prior.select(*spans)
    assert found[0] == without[0]
    assert found[1] != without[1]
    common = [len(set(middle(part[1], 208)) & set(middle(part[0], 200))) for part in (found, without)]
    assert common[0] > common[1]


def test_the_grid() -> None:
    every = list(variants())
    assert every[0].config == OURS == TokenSelectConfig()
    names = [(variant.setting, variant.value) for variant in every]
    assert len(set(names)) == len(names)
    for variant in every:
        variant.config.check_window(8192)
        assert variant.setting in ("default", "vote", "head_mapping", "lead") or variant.config != OURS, variant
        if variant.setting == "vote":
            assert variant.config.score_dtype == "same"
    settings: dict[str, Any] = {}
    for setting, value in names:
        settings.setdefault(setting, set()).add(value)
    assert settings["num_selected_tokens"] == {"128", "256", "1024", "2048", "4096"}
    for test in ("group_min", "flat"):
        assert settings[f"reuse_threshold, {test}"] == {"0.5", "0.7", "0.8", "0.85", "0.9", "0.95", "1.0"}
