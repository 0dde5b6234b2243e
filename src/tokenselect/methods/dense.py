"""Dense attention: the model as it is, with progress while it reads."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def dense(model: nn.Module, on_prefill: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Run the plain model and tell how far its prompt is.

    Args:
        model: a decoder of Transformers.
        on_prefill: called after each layer with (tokens x layers done / all layers, tokens).
    """
    with ExitStack() as stack:
        if on_prefill is not None:
            layers = _layers(model)
            for index, layer in enumerate(layers):
                hook = partial(_tell, on_prefill, (index + 1) / len(layers))
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers; none where they are not to be found, which costs the progress only."""
    config: Any = model.config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    return []


def _tell(
    on_prefill: Callable[[int, int], None],
    share: float,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: object,
) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.shape[1] > 1:  # a decode step reads one token
        on_prefill(round(hidden.shape[1] * share), hidden.shape[1])
