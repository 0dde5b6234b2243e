"""Dense attention with a rotary embedding that is scaled to the prompt's length, by Transformers' own formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenselect.integrations.host import inspect_model
from tokenselect.integrations.undo import override
from tokenselect.methods.dense import dense
from tokenselect.methods.reach import Reach


class ScaledRotary:
    """A model's rotary embedding, scaled for each reach that is asked for.

    Args:
        rotary: the model's module; it is copied, never changed.
        rope_type: "dynamic" (NTK) or "yarn", a name in Transformers.
        window: trained window.

    Raises:
        NotImplementedError: the model's embedding is scaled already.
    """

    def __init__(self, rotary: Any, rope_type: str, window: int) -> None:
        if (own := getattr(rotary, "rope_type", None)) != "default":
            raise NotImplementedError(f"the rotary embedding of this model is scaled already ({own})")
        self.rotary, self.rope_type, self.window = rotary, rope_type, window
        self._scaled: dict[int, nn.Module] = {}

    def at(self, reach: int) -> Any:
        """The module for so many positions; at most the window: the model's own."""
        if reach <= self.window:
            return self.rotary
        if reach not in self._scaled:
            self._scaled[reach] = self._scale(reach)
        return self._scaled[reach]

    def _scale(self, reach: int) -> nn.Module:
        scaled = copy.deepcopy(self.rotary)
        scaled.__dict__.pop("forward", None)  # ours, which would call itself
        factor = reach / self.window
        config = copy.deepcopy(self.rotary.config)
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": self.rope_type,
            # dynamic: the base grows with the length that is told below, and by nothing else
            "factor": 1.0 if self.rope_type == "dynamic" else factor,
            "original_max_position_embeddings": self.window,
        }
        device = self.rotary.inv_freq.device
        frequencies, scaled.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config, device, seq_len=reach)
        scaled.inv_freq = frequencies
        module: nn.Module = scaled
        return module


@contextmanager
def scaled_dense(
    model: nn.Module, rotary: ScaledRotary, on_prefill: Callable[[int, int], None] | None = None
) -> Iterator[None]:
    """Run the plain model with a scaled embedding; see `methods.attach`."""
    reach = Reach(rotary.window)

    def turn(original: Callable[..., Any], x: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        module = rotary.at(reach.update(position_ids))
        return original(x, position_ids, **kwargs) if module is rotary.rotary else module(x, position_ids, **kwargs)

    with ExitStack() as stack:
        override(stack, rotary.rotary, "forward", turn)
        stack.enter_context(dense(model, on_prefill))
        yield


def prepare(model: nn.Module, rope_type: str) -> ScaledRotary:
    """Look at a model before it is entered; for what can be raised see `ScaledRotary` and `inspect_model`."""
    host = inspect_model(model)
    return ScaledRotary(host.decoder.rotary_emb, rope_type, host.trained_window)
