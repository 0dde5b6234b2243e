"""StreamingLLM: sinks and the most recent tokens alone.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024 (arXiv 2309.17453).
"""

from __future__ import annotations

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Choice


def _same_window(config: TokenSelectConfig) -> TokenSelectConfig:
    # Without a selection there is nothing to reuse, and reuse would count a second local window.
    return config.replace(num_selected_tokens=0, num_dense_tokens=0, reuse_threshold=2.0)


def _same_budget(config: TokenSelectConfig) -> TokenSelectConfig:
    return _same_window(config).replace(num_local_tokens=config.num_local_tokens + config.num_selected_tokens)


STREAMING = Choice(_same_budget)  # the local window grows by what would be selected
STREAMING_SAME_WINDOW = Choice(_same_window)
