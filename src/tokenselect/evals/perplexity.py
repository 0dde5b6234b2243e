"""How well each token of a long text is foretold, by position: a method against a sliding window of the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_ROWS = 1024  # of logits at once


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
def window_losses(model: PreTrainedModel, ids: Tensor, context: int, block: int) -> Tensor:
    """The same where every block of tokens is read afresh after the tokens right before it, and nothing else.

    So each token sees as many others as under a selection whose budget is `context` plus the block itself. (A window
    that slides over kept keys is no baseline: without the first tokens attention collapses; Xiao et al., 2023.)

    Args:
        model: as it is, without a method.
        ids: [num_tokens] int64.
        context: tokens before a block.
        block: tokens that are read together.

    Returns:
        As `losses`.
    """
    ids, parts = ids.to(model.device), []
    for start in range(0, len(ids), block):
        first = max(0, start - context)
        hidden = model.base_model(input_ids=ids[None, first : start + block], use_cache=False).last_hidden_state[0]
        following = ids[start + 1 : start + block + 1]
        parts.append(_losses(model, hidden[start - first :][: len(following)], following))
    return torch.cat(parts)


def _losses(model: PreTrainedModel, hidden: Tensor, following: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    parts = []
    for first in range(0, len(following), _ROWS):
        rows = slice(first, first + _ROWS)
        logits = head(hidden[rows]).float()
        parts.append(torch.nn.functional.cross_entropy(logits, following[rows], reduction="none").cpu())
    return torch.cat(parts)


def _check_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """Some models scale or cap their logits: find out, rather than know them all."""
    logits = model(input_ids=ids[None]).logits[0, -1]
    own = model.get_output_embeddings()(model.base_model(input_ids=ids[None]).last_hidden_state[0, -1])
    if not torch.allclose(logits.float(), own.float(), rtol=1e-2, atol=1e-2):
        raise NotImplementedError(f"perplexity is not supported for {type(model).__name__}: it changes its logits")
