"""What is selected, in vLLM's own Prometheus registry and its log."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping, Sequence

from prometheus_client import Counter
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.ragged import Stretch
from tokenselect.integrations.vllm.requests import RequestState
from tokenselect.integrations.vllm.step import Step
from tokenselect.integrations.vllm.tally import Tally

_log = init_logger("vllm.tokenselect")
ATTENDED = Counter("vllm:tokenselect_attended_tokens", "Tokens attended per layer by queries that selected")
AVAILABLE = Counter("vllm:tokenselect_available_tokens", "Tokens that there were for the queries that selected")
SELECTED = Counter("vllm:tokenselect_selected_tokens", "Tokens chosen per layer, of those attended")
QUERIES = Counter("vllm:tokenselect_queries", "Queries, by whether they selected", ["attention"])
DENSE = Counter("vllm:tokenselect_dense_fallbacks", "Queries that attended all earlier tokens, by reason", ["reason"])
LOOKUPS = Counter("vllm:tokenselect_cache_lookups", "Decode steps that asked the Selection Cache, over all layers")
HITS = Counter("vllm:tokenselect_cache_hits", "Decode steps that the Selection Cache served, over all layers")
SECONDS = Counter("vllm:tokenselect_selection_seconds", "Seconds in which tokens were chosen, over all layers")
_BY_ATTENTION = {name: QUERIES.labels(name) for name in ("selected", "whole")}
_BY_REASON = {name: DENSE.labels(name) for name in ("short_context", "covered")}


class Metrics:
    """Counts of one builder's layers.

    Args:
        num_layers: there are.
    """

    def __init__(self, num_layers: int) -> None:
        self.tally = Tally()
        self._num_layers = num_layers
        # processes that share a model see the same queries: one speaks for all
        self._counts = get_tp_group().rank_in_group == get_pp_group().rank_in_group == 0

    def announce(self, config: TokenSelectConfig, backend: str, block_size: int) -> None:
        """Say which backend and settings run."""
        settings = " ".join(config.to_json().split())
        _log.info("TokenSelect runs on backend %s, %d tokens per KV block: %s", backend, block_size, settings)

    def count(self, step: Step, stretches: Sequence[Stretch]) -> None:
        """Count what one forward pass attends, and what the layers noted in the one before."""
        self.flush()
        selecting = {place for part in step.selections for place in part.places}
        if self._counts:
            _count_dense(step, stretches, selecting)
        if not selecting:
            return
        bounds = step.slot_start_loc.tolist()
        sums: Counts[Counter] = Counts()
        for place in selecting:
            block = step.blocks[place]
            state, own = step.states[block.sequence], block.end - block.start
            attended, available = own * (bounds[place + 1] - bounds[place]), own * block.end
            state.note(own, attended, available)
            selected = own * state.config.num_selected_tokens
            sums.update({ATTENDED: attended, AVAILABLE: available, SELECTED: selected, _BY_ATTENTION["selected"]: own})
        self._add(sums)

    def flush(self) -> None:
        """Count what the layers noted."""
        noted = self.tally.take()
        further = noted.further / self._num_layers
        self._add({LOOKUPS: noted.lookups, HITS: noted.hits, SECONDS: noted.seconds, ATTENDED: further})

    def leave(self, state: RequestState) -> None:
        """Say what one request selected, now that it ended."""
        self.flush()
        if not self._counts:
            return
        queries, layers = max(1, state.num_selecting), state.layers.values()
        _log.debug(
            "TokenSelect: request %s ended at %d tokens: %d queries selected, which attended %.1f of %.1f tokens on "
            "average; %d lookups, %d hits",
            state.name,
            state.next_start,
            state.num_selecting,
            state.attended / queries,
            state.available / queries,
            sum(layer.lookups for layer in layers),
            sum(layer.hits for layer in layers),
        )

    def _add(self, sums: Mapping[Counter, float]) -> None:
        for counter, amount in sums.items():
            if amount and self._counts:
                counter.inc(amount)


def _count_dense(step: Step, stretches: Sequence[Stretch], selecting: set[int]) -> None:
    """Queries that select nothing: their context is short, or their budget covers what comes before them."""
    sums: Counts[str] = Counts()
    for place, block in enumerate(step.blocks):
        if place not in selecting:
            length = max(stretches[block.sequence].known_length, block.end)
            is_short = length <= step.states[block.sequence].config.num_dense_tokens
            sums["short_context" if is_short else "covered"] += block.end - block.start
    for reason, queries in sums.items():
        _BY_REASON[reason].inc(queries)
    if total := sums.total():
        _BY_ATTENTION["whole"].inc(total)
