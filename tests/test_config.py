"""Settings are checked when they are made, and every message says what to change."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from tokenselect.config import TokenSelectConfig

COUNTS = [item.name for item in fields(TokenSelectConfig) if item.type in ("int", "int | None")]
POSITIVE = ["block_size", "distance_bucket_size", "max_distance", "smoothing_window", "prefill_chunk_size"]
SWITCHES = ["head_weights", "scale_votes", "local_includes_block", "kv_offload"]


def test_counts_are_all_here() -> None:
    assert len(COUNTS) == 11
    assert set(POSITIVE) < set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, -(10**30), 2**31, 10**30], ids=["-1", "very-negative", "2**31", "huge"])
def test_a_count_out_of_range_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be between [01] and 2147483647, got {value}$"):
        TokenSelectConfig(**{name: value})


@pytest.mark.parametrize("name", POSITIVE)
def test_a_zero_where_one_is_least_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be between 1 and 2147483647, got 0$"):
        TokenSelectConfig(**{name: 0})


@pytest.mark.parametrize("name", sorted(set(COUNTS) - set(POSITIVE)))
def test_zero_is_a_count_where_nothing_is_meant(name: str) -> None:
    assert getattr(TokenSelectConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [True, 1.0, "4", [4]], ids=repr)
def test_a_count_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be int, got "):
        TokenSelectConfig(**{name: value})


@pytest.mark.parametrize("name", sorted(set(COUNTS) - {"max_distance"}))
def test_only_max_distance_may_be_none(name: str) -> None:
    assert TokenSelectConfig(max_distance=None).max_distance is None
    with pytest.raises(TypeError, match=f"^{name} must be int, got None$"):
        TokenSelectConfig(**{name: None})


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), -0.1, -1, 10**400], ids=lambda v: str(v)[:9]
)
def test_a_threshold_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^reuse_threshold must be a finite number >= 0, got "):
        TokenSelectConfig(reuse_threshold=value)


@pytest.mark.parametrize("value", [True, "0.9", None], ids=repr)
def test_a_threshold_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^reuse_threshold must be float, got "):
        TokenSelectConfig(reuse_threshold=value)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "yes", None], ids=repr)
def test_a_switch_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be bool, got "):
        TokenSelectConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "choices"), [("scoring", "merged, mix, position_free, distance"), ("reuse_test", "group_min, flat")]
)
@pytest.mark.parametrize("value", ["best", "", 3, None, ["mix"]], ids=repr)
def test_an_unknown_choice_is_refused(name: str, choices: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of {choices}, got "):
        TokenSelectConfig(**{name: value})


def test_a_backend_must_be_a_name() -> None:
    with pytest.raises(TypeError, match=r"^backend must be str, got 3$"):
        TokenSelectConfig(backend=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [2, 64])
def test_an_even_smoothing_window_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"^smoothing_window must be odd, got {width}$"):
        TokenSelectConfig(smoothing_window=width)


def test_a_block_must_fit_into_a_local_window_that_includes_it() -> None:
    with pytest.raises(ValueError, match=r"^num_local_tokens must be >= block_size \(64\).*got 63$"):
        TokenSelectConfig(local_includes_block=True, block_size=64, num_local_tokens=63)
    assert TokenSelectConfig(local_includes_block=True, block_size=64, num_local_tokens=64).block_size == 64


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TokenSelectConfig().block_size = 3  # type: ignore[misc]


def test_a_changed_copy_is_checked() -> None:
    config = TokenSelectConfig()
    assert config.replace(block_size=7) == TokenSelectConfig(block_size=7)
    assert config == TokenSelectConfig()
    with pytest.raises(ValueError, match="block_size"):
        config.replace(block_size=0)


# -- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TokenSelectConfig(),
        TokenSelectConfig.paper(),
        TokenSelectConfig(max_distance=77, scoring="distance", reuse_threshold=0.125, backend="reference"),
    ],
    ids=["default", "paper", "other"],
)
def test_json_round_trip(config: TokenSelectConfig) -> None:
    assert TokenSelectConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())) == {item.name for item in fields(config)}


def test_settings_missing_in_json_take_their_defaults() -> None:
    assert TokenSelectConfig.from_json('{"block_size": 7}') == TokenSelectConfig(block_size=7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{'block_size': 3}", "not valid JSON"),
        ("[]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ('{"blocksize": 3, "k": 4}', "unknown setting blocksize, k; known are num_sink_tokens"),
        ('{"block_size": 0}', "block_size must be between 1"),
        ('{"reuse_threshold": NaN}', "reuse_threshold must be a finite number"),
        ('{"reuse_threshold": Infinity}', "reuse_threshold must be a finite number"),
        ('{"scoring": "best"}', "scoring must be one of"),
        ('{"block_size": "512"}', "block_size must be int"),
        ('{"head_weights": 1}', "head_weights must be bool"),
    ],
)
def test_bad_json_is_a_value_error_that_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenSelectConfig.from_json(text)


# -- presets and arithmetic ----------------------------------------------------------------------------------


def test_paper_has_the_published_values() -> None:
    paper = TokenSelectConfig.paper()
    assert (paper.block_size, paper.num_sink_tokens, paper.num_local_tokens) == (512, 128, 512)
    assert paper.num_selected_tokens == 2048
    assert paper.num_dense_tokens == 0
    assert paper.local_includes_block
    assert not paper.scale_votes
    assert (paper.scoring, paper.vote_horizon) == ("position_free", 0)
    assert (paper.reuse_threshold, paper.reuse_test, paper.reuse) == (0.9, "flat", True)
    assert paper.smoothing_window == 1
    assert paper.num_tail_tokens == 0


def test_defaults_are_the_starting_values_of_the_method() -> None:
    config = TokenSelectConfig()
    assert (config.num_sink_tokens, config.num_local_tokens, config.num_selected_tokens) == (128, 512, 512)
    assert (config.block_size, config.num_tail_tokens, config.distance_bucket_size) == (512, 64, 64)
    assert (config.scoring, config.position_free_weight, config.head_weights) == ("merged", 2.0, False)
    assert (config.vote_horizon, config.vote_prior, config.reuse) == (512, 1e-4, False)


@pytest.mark.parametrize(("threshold", "on"), [(0.0, True), (0.9, True), (1.0, True), (1.0001, False), (2, False)])
def test_the_selection_cache_is_off_above_one(threshold: float, on: bool) -> None:
    assert TokenSelectConfig(reuse_threshold=threshold).reuse is on


@pytest.mark.parametrize(
    ("changes", "limit", "budget"),
    [
        ({}, 60, 80),
        ({"num_selected_tokens": 0}, 20, 40),
        ({"reuse_threshold": 0.9}, 60, 80),
        (
            {"reuse_threshold": 0.9, "block_size": 4},
            60,
            76,
        ),  # a step may reach back over twice the local window
    ],
    ids=["plain", "sinks-and-local", "reuse", "reuse-small-block"],
)
def test_budget(changes: dict[str, Any], limit: int, budget: int) -> None:
    base = {"num_sink_tokens": 5, "num_local_tokens": 15, "num_selected_tokens": 40, "block_size": 20}
    config = TokenSelectConfig(**{**base, **changes})
    assert (config.dense_limit, config.budget) == (limit, budget)


def test_check_window_names_both_numbers_and_what_to_lower() -> None:
    config = TokenSelectConfig()
    config.check_window(1664)
    with pytest.raises(ValueError, match=r"budget of 1664 tokens.*window of 1663: lower num_selected_tokens"):
        config.check_window(1663)


@pytest.mark.parametrize(("window", "whole"), [(100, 100), (8192, 8192), (131072, 8192)])
def test_no_more_than_the_trained_window_is_attended_whole(window: int, whole: int) -> None:
    config = TokenSelectConfig()
    assert config.for_window(window) == config.replace(num_dense_tokens=whole)


def test_what_a_query_attends() -> None:
    config = TokenSelectConfig(num_dense_tokens=3000)
    assert [config.num_attended(length) for length in (1, 3000, 3001, 10**6)] == [1, 3000, 1664, 1664]
    assert TokenSelectConfig(num_dense_tokens=0).num_attended(1000) == 1000


@pytest.mark.parametrize("item", fields(TokenSelectConfig), ids=lambda item: item.name)
def test_every_setting_has_help(item: Any) -> None:
    assert len(item.metadata["help"]) > 10
