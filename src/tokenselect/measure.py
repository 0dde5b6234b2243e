"""How long a model takes to read a prompt and to write, fairly: methods take turns, and quantiles are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from transformers import Cache, DynamicCache

from tokenselect.integrations.cache_name import CACHE
from tokenselect.methods import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tokenselect.config import TokenSelectConfig
    from tokenselect.models import LoadedModel


_T = TypeVar("_T")


class Quantiles(NamedTuple):
    """The fifth, the half and four fifths of the samples are no larger than these."""

    p20: float
    p50: float
    p80: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Quantiles of at least one sample, interpolated linearly between two of them."""
    values = torch.tensor(samples, dtype=torch.float64)
    return Quantiles(*torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def alternate(
    calls: Mapping[str, Callable[[], _T]], repeats: int, seconds: float = float("inf")
) -> dict[str, list[_T]]:
    """Let calls take turns, so that the machine's noise meets all of them.

    Args:
        calls: what to run, by name. Every other round goes backwards: nobody always follows the same one.
        repeats: most runs of each.
        seconds: a call that has taken so long in all is not repeated.

    Returns:
        What each call returned, at least one result each, in the order of the runs.
    """
    results: dict[str, list[_T]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for turn in range(repeats):
        names = [name for name in calls if not turn or spent[name] < seconds]
        for name in names if turn % 2 == 0 else names[::-1]:
            started = time.perf_counter()
            results[name].append(calls[name]())
            spent[name] += time.perf_counter() - started
    return results


@dataclass(slots=True)
class Run:
    """One prompt read and some tokens written after it.

    Attributes:
        prefill_s: seconds until the first token.
        steps_s: seconds of each further token.
        tokens: what was written, greedily.
        progress: (tokens read, seconds since the start) after each chunk of the prompt, where the method reads
            in chunks.
    """

    prefill_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    progress: list[tuple[int, float]] = field(default_factory=list)


@torch.no_grad()
def read_and_write(
    loaded: LoadedModel, ids: Tensor, method: str, config: TokenSelectConfig, num_steps: int, cache: Cache | None = None
) -> Run:
    """Read a prompt with a method and write greedily; the end-of-text token ends nothing.

    Args:
        loaded: the model, which is left as it was.
        ids: [1, tokens] int64.
        method: one of `methods.METHODS`.
        config: the settings.
        num_steps: tokens after the first one.
        cache: what was read before; by default nothing.

    Returns:
        The times. The model is called directly: the work of `generate` around it, which is the same for all
        methods, is not in them.
    """
    run, cache = Run(), cache if cache is not None else DynamicCache(config=loaded.model.config)
    started = time.perf_counter()

    def on_prefill(done: int, total: int) -> None:
        run.progress.append((done, time.perf_counter() - started))

    # Dense attention reads in one pass: its progress counts layers, not tokens.
    with attach(loaded.model, method, config, None if method == "dense" else on_prefill):
        token, started = ids, time.perf_counter()
        for _ in range(num_steps + 1):
            before = time.perf_counter()
            token = loaded.model(token, logits_to_keep=1, **{CACHE: cache}).logits[:, -1].argmax(-1, keepdim=True)
            run.steps_s.append(time.perf_counter() - before)
            run.tokens.append(int(token))
    run.prefill_s = run.steps_s.pop(0)
    return run


def warm_up(loaded: LoadedModel, ids: Tensor, method: str, config: TokenSelectConfig) -> None:
    """Let a method do once, unmeasured, what it does on its first run only; a long prompt is cut short."""
    enough = 2 * config.block_size
    if method != "dense":  # so long that something is selected
        enough += max(config.num_dense_tokens, config.budget)
    read_and_write(loaded, ids[:, :enough], method, config, 2)
