"""What is compared, behind one interface: enter a method, generate, leave the model as it was."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import nn

    from tokenselect.config import TokenSelectConfig
    from tokenselect.methods.selecting import Choice
    from tokenselect.trace.recorder import Recorder

# Where each is: modules are imported when they are asked for. These choose cached tokens ...
_CHOICES = {
    "tokenselect": "selecting:Choice",
    "streaming": "streaming:STREAMING",
    "streaming_same_window": "streaming:STREAMING_SAME_WINDOW",
    "infllm": "infllm:INFLLM",
    "quest": "quest:QUEST",
    "snapkv": "snapkv:SNAPKV",
    "paper": "paper:PAPER",
    "published": "published:PUBLISHED",
}
# ... and these attend the whole context.
_DENSE = {
    "dense": "dense:dense",
    "ntk": "ntk:attach_ntk",
    "yarn": "yarn:attach_yarn",
    "self_extend": "self_extend:attach_self_extend",
}
METHODS = (
    "tokenselect",
    "streaming",
    "dense",
    *(name for name in _CHOICES if name not in ("tokenselect", "streaming")),
    *(name for name in _DENSE if name != "dense"),
)


def choice(method: str) -> Choice | None:
    """How a method chooses cached tokens; None: it attends the whole context.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method in _DENSE:
        return None
    found = _load(_CHOICES[method])
    return cast("Choice", found() if method == "tokenselect" else found)


def method_config(method: str, config: TokenSelectConfig) -> TokenSelectConfig | None:
    """The settings that a method runs with.

    Args:
        method: one of `METHODS`.
        config: the settings that were asked for.

    Returns:
        "tokenselect": `config` itself. "streaming": sinks and local tokens alone; the local window grows by what
        would be selected, so the budget is the same ("streaming_same_window": it does not grow). "infllm", "quest" and
        "snapkv": the budget of `config`, at every length. "paper" and "published": the published settings. The others,
        which attend the whole context: None.

    Raises:
        ValueError: there is no such method.
    """
    if method == "tokenselect":
        return config
    chosen = choice(method)
    return None if chosen is None else chosen.settings(config)


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
            generates. For methods that attend the whole context, whose prompt goes through in one pass, the share of
            layers done stands for the share of tokens.
        recorder: is told what is selected; methods that attend the whole context select nothing.

    Returns:
        A context manager that has not been entered; the model is checked already.

    Raises:
        ValueError: there is no such method, or the budget is larger than the model's trained window.
        NotImplementedError: the model cannot be served by the method; the message names why.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    chosen = choice(method)
    if chosen is None:
        return cast("AbstractContextManager[Any]", _load(_DENSE[method])(model, on_prefill=on_prefill))
    return chosen.attach(model, config, on_prefill, recorder)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"tokenselect.methods.{module}"), name)
