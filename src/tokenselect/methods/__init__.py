"""What is compared, behind one interface: enter a method, generate, leave the model as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import nn

    from tokenselect.config import TokenSelectConfig
    from tokenselect.trace.recorder import Recorder

METHODS = ("tokenselect", "streaming", "dense")


def method_config(method: str, config: TokenSelectConfig) -> TokenSelectConfig | None:
    """The settings that a method runs with.

    Args:
        method: one of `METHODS`.
        config: the settings that were asked for.

    Returns:
        "tokenselect": `config` itself. "streaming" (StreamingLLM, Xiao et al., 2023): sinks and local tokens
        alone; the local window grows by what would be selected, so the budget is the same. "dense": None.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "dense":
        return None
    if method == "tokenselect":
        return config
    # Without a selection there is nothing to reuse, and reuse would count a second local window.
    return config.replace(
        num_selected_tokens=0,
        num_dense_tokens=0,
        num_local_tokens=config.num_local_tokens + config.num_selected_tokens,
        reuse_threshold=2.0,
    )


def attach(
    model: nn.Module,
    method: str,
    config: TokenSelectConfig,
    on_prefill: Callable[[int, int], None] | None = None,
    recorder: Recorder | None = None,
) -> AbstractContextManager[Any]:
    """Let a model run with a method as long as the returned context is entered.

    Args:
        model: a decoder of Transformers.
        method: one of `METHODS`.
        config: the settings.
        on_prefill: called with (tokens read, tokens to read) while a prompt is read, in the thread that
            generates. For "dense", whose prompt goes through in one pass, the share of layers done stands
            for the share of tokens.
        recorder: is told what is selected; dense attention selects nothing.

    Returns:
        A context manager that has not been entered; the model is checked already.

    Raises:
        ValueError: there is no such method, or the budget is larger than the model's trained window.
        NotImplementedError: the model cannot be served by the method; the message names why.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    settings = method_config(method, config)
    if settings is None:
        from tokenselect.methods.dense import dense

        return dense(model, on_prefill)
    from tokenselect.integrations.transformers import TokenSelect

    return TokenSelect(model, settings, on_prefill, recorder)
