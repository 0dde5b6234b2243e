"""All variants of our method that ablations measure, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from benchmarks.variants.choices import TopP, select_with_prior
from benchmarks.variants.queries import LowFrequencies, ModuloHeads
from benchmarks.variants.votes import largest_share, one_head_one_vote, root_of_shares, sum_of_logits, voting
from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Choice

OURS = TokenSelectConfig()
_EXACT = OURS.replace(score_dtype="same")  # other votes read keys as they are cached


@dataclass(frozen=True, slots=True)
class Variant:
    """One change of one setting; all else is as by default."""

    setting: str
    value: str
    config: TokenSelectConfig
    choice: Choice = field(default_factory=Choice)


def variants() -> Iterator[Variant]:
    """Every variant once; the default comes first."""
    yield Variant("default", "default", OURS)
    yield from _votes()
    yield from _of("scoring", "mix", "position_free", "distance")
    yield from _of("position_free_weight", 0.0, 1.0, 4.0)
    yield from _of("vote_prior", 0.0, 3e-5, 3e-4, 1e-3)
    yield from _of("vote_horizon", 0, 128, 2048)
    yield from _of("num_selected_tokens", 128, 256, 1024, 2048, 4096)
    yield from _thresholds("group_min", 0.9, 0.8, 0.95, 0.7, 0.5, 0.85, 1.0)
    yield from _of("num_tail_tokens", 0, 16, 128, 256)
    yield Variant("head_mapping", "modulo", OURS, Choice(around=ModuloHeads))
    yield from _of("score_dtype", "same")
    yield from _leads()
    yield from _of("block_size", 64, 128, 256)
    yield Variant("local_includes_block", "True", OURS.replace(local_includes_block=True))
    yield Variant("local_includes_block", "True, 1024", OURS.replace(local_includes_block=True, num_local_tokens=1024))
    yield from _of("scale_votes", False)
    yield from _of("smoothing_window", 3, 7)
    yield from _thresholds("flat", 0.9, 0.8, 0.95, 0.7, 0.5, 0.85, 1.0)
    yield from _of("head_weights", True)
    yield from _of("num_local_tokens", 128, 256, 1024)
    yield from _of("distance_bucket_size", 16, 256)
    yield from _of("max_distance", 2048, 4096)


def _of(setting: str, *values: object) -> Iterator[Variant]:
    for value in values:
        yield Variant(setting, str(value), OURS.replace(**{setting: value}))


def _thresholds(test: str, *values: float) -> Iterator[Variant]:
    """The Selection Cache at several thresholds."""
    for value in values:
        yield Variant(f"reuse_threshold, {test}", str(value), OURS.replace(reuse_threshold=value, reuse_test=test))


def _votes() -> Iterator[Variant]:
    named = partial(one_head_one_vote, k=OURS.num_selected_tokens)
    yield Variant("vote", "sum", _EXACT, Choice(around=voting(sum_of_logits)))
    yield Variant("vote", "one_head_one_vote", _EXACT, Choice(around=voting(named)))


def _leads() -> Iterator[Variant]:
    """Ideas of method.md, section 5, that are no setting."""
    yield Variant("lead", "prior of the last block", OURS, Choice(select=select_with_prior))
    yield Variant("lead", "low frequencies", OURS, Choice(around=LowFrequencies))
    yield Variant("lead", "largest share of a head", _EXACT, Choice(around=voting(largest_share)))
    yield Variant("lead", "root of shares", _EXACT, Choice(around=voting(root_of_shares)))
    for share in (0.9, 0.7):
        yield Variant("lead", f"top-p {share}", OURS, Choice(select=TopP(share)))
        wide = OURS.replace(num_selected_tokens=2048)
        yield Variant("lead", f"top-p {share} of at most 2048", wide, Choice(select=TopP(share)))
