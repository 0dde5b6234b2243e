"""How well each token of a long text is foretold, by position: a method against a sliding window of the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_ROWS = 1024  # of logits at once
_CHUNK = 2048
_MOVING = ("dynamic", "longrope")  # rotations that change with the length: kept keys would no longer fit


@torch.no_grad()
def losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Loss of every token after the first, the text being read at once by whatever method the model runs with.

    Args:
        model: a decoder of Transformers.
        ids: [num_tokens] int64, at least two.

    Returns:
        [num_tokens - 1] float32 on the CPU, in nats: minus the log-probability of `ids[1:]`.

    Raises:
        NotImplementedError: the model's logits are not its output embedding of the last hidden state.
    """
    ids = ids.to(model.device)
    _check_logits(model, ids[:8])
    hidden = model.base_model(input_ids=ids[None]).last_hidden_state[0]
    return _losses(model, hidden[:-1], ids[1:])


@torch.no_grad()
def window_losses(model: PreTrainedModel, ids: Tensor, window: int) -> Tensor:
    """The same for plain attention in which every token attends the last `window` tokens, itself included.

    Args:
        model: as it is, without a method.
        ids: [num_tokens] int64.
        window: tokens.

    Returns:
        As `losses`.

    Raises:
        NotImplementedError: the model's rotations change with the length.
    """
    _check_rotation(model)
    ids = ids.to(model.device)
    cache, parts = DynamicCache(), []
    for start in range(0, len(ids), _CHUNK):
        own = ids[start : start + _CHUNK]
        kept = cache.get_seq_length()
        mask = _window_mask(kept, len(own), window, model.device)
        positions = torch.arange(start, start + len(own), device=model.device)
        hidden = model.base_model(
            input_ids=own[None],
            position_ids=positions[None],
            attention_mask=torch.zeros(mask.shape, dtype=model.dtype, device=model.device).masked_fill_(
                ~mask, torch.finfo(model.dtype).min
            ),
            past_key_values=cache,
        ).last_hidden_state[0]
        following = ids[start + 1 : start + len(own) + 1]
        parts.append(_losses(model, hidden[: len(following)], following))
        _drop_old(cache, window - 1)
    return torch.cat(parts)


def _window_mask(kept: int, own: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, own, kept + own], true where a query attends."""
    query = torch.arange(kept, kept + own, device=device)[:, None]
    key = torch.arange(kept + own, device=device)
    return ((key <= query) & (key > query - window))[None, None]


def _drop_old(cache: DynamicCache, keep: int) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, -keep:].clone() if keep else layer.keys[:, :, :0]
        layer.values = layer.values[:, :, -keep:].clone() if keep else layer.values[:, :, :0]


def _losses(model: PreTrainedModel, hidden: Tensor, following: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    pairs = zip(hidden.split(_ROWS), following.split(_ROWS), strict=True)
    entropy = torch.nn.functional.cross_entropy
    return torch.cat([entropy(head(part).float(), wanted, reduction="none").cpu() for part, wanted in pairs])


def _check_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """Some models scale or cap their logits: find out, rather than know them all."""
    logits = model(input_ids=ids[None]).logits[0, -1]
    own = model.get_output_embeddings()(model.base_model(input_ids=ids[None]).last_hidden_state[0, -1])
    if not torch.allclose(logits.float(), own.float(), rtol=1e-2, atol=1e-2):
        raise NotImplementedError(f"perplexity is not supported for {type(model).__name__}: it changes its logits")


def _check_rotation(model: PreTrainedModel) -> None:
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if parameters.get("rope_type") in _MOVING:
        raise NotImplementedError(f"a sliding window is not supported with rope_type {parameters['rope_type']!r}")
