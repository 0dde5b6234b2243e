"""What is selected, in vLLM's own Prometheus registry and its log."""

from __future__ import annotations

from prometheus_client import Counter
from vllm.logger import init_logger

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.vllm.step import Step

_log = init_logger("vllm.tokenselect")
_ATTENDED = Counter("vllm:tokenselect_attended_tokens", "Tokens attended per layer by queries that selected")
_AVAILABLE = Counter("vllm:tokenselect_available_tokens", "Tokens that there were for the queries that selected")
_QUERIES = Counter("vllm:tokenselect_queries", "Queries, by whether they selected", ["attention"])


def announce(config: TokenSelectConfig, backend: str, block_size: int) -> None:
    """Say which backend and settings run."""
    _log.info("TokenSelect runs on backend %s, %d tokens per KV block: %s", backend, block_size, config.to_json())


def count(step: Step) -> None:
    """Count what one forward pass attends."""
    places = {place for part in step.selections for place in part.places}
    bounds = step.slot_start_loc.tolist()
    for place, block in enumerate(step.blocks):
        own = block.end - block.start
        _QUERIES.labels("selected" if place in places else "whole").inc(own)
        if place in places:
            _ATTENDED.inc(own * (bounds[place + 1] - bounds[place]))
            _AVAILABLE.inc(own * block.end)
