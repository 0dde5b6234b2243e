"""Is the far context read? Real long texts, and needle tests that hide one number in a long document."""

from tokenselect.evals.needle import (
    CITIES,
    FACT_WORDINGS,
    PASSKEY_WORDINGS,
    REPHRASED_WORDINGS,
    Sample,
    Wording,
    demo_samples,
    fact_grid,
    fact_in_text,
    is_right,
    passkey,
    passkey_grid,
    raw_prompt,
)
from tokenselect.evals.texts import count_tokens, state_of_the_union, token_window

__all__ = [
    "CITIES",
    "FACT_WORDINGS",
    "PASSKEY_WORDINGS",
    "REPHRASED_WORDINGS",
    "Sample",
    "Wording",
    "count_tokens",
    "demo_samples",
    "fact_grid",
    "fact_in_text",
    "is_right",
    "passkey",
    "passkey_grid",
    "raw_prompt",
    "state_of_the_union",
    "token_window",
]
