"""TokenSelect as published.

Source: Wu et al., "TokenSelect", EMNLP 2025 (arXiv 2411.02886), section 4; `TokenSelectConfig.paper`.
"""

from __future__ import annotations

from tokenselect.config import TokenSelectConfig
from tokenselect.methods.selecting import Choice


def paper_settings(config: TokenSelectConfig) -> TokenSelectConfig:
    """The published settings, whatever was asked for; who computes them is still the caller's choice."""
    return TokenSelectConfig.paper().replace(
        score_dtype="same", backend=config.backend, prefill_chunk_size=config.prefill_chunk_size
    )


PAPER = Choice(paper_settings)
