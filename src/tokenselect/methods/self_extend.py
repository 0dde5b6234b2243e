"""SelfExtend: dense attention in which far tokens share positions, so that no distance is larger than those trained.

Tokens up to `NEIGHBOURS` apart meet at their true distance; of farther ones positions are divided by the group size
(rounded down), and the query is shifted so that the two kinds meet. The group size follows from the prompt's length, by
the authors' rule that two thirds of the trained window have to hold it.

Source: Jin et al., "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", ICML 2024 (arXiv 2401.01325),
section 3 and algorithm 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tokenselect.integrations.host import Host, inspect_model, learn_rotary
from tokenselect.integrations.undo import override
from tokenselect.methods.dense import dense
from tokenselect.methods.reach import Reach
from tokenselect.methods.rotation import rotations
from tokenselect.ops.reference import rotate

if TYPE_CHECKING:
    from tokenselect.rotary import RotaryTable

NEIGHBOURS = 1024  # of a window of 4,096 or more; of a smaller one a quarter
_NAME = "tokenselect_self_extend"
_QUERIES_AT_ONCE = 512


def group_size(length: int, window: int, neighbours: int) -> int:
    """Least group size with which `neighbours + (length - neighbours) / size` is within two thirds of the window."""
    if length <= window:
        return 1
    return -(-(length - neighbours) // (window * 2 // 3 - neighbours))


def self_extend_attention(
    queries: Tensor, keys: Tensor, values: Tensor, table: RotaryTable, size: int, neighbours: int, scale: float
) -> Tensor:
    """Attention of the last tokens of a sequence.

    Query `i` meets key `j` at the distance `i - j` where that is less than `neighbours`, and else at
    `i // size + neighbours - neighbours // size - j // size`.

    Args:
        queries: [Hq, n, D], raw, of the last n tokens.
        keys: [Hkv, T, D], raw.
        values: like `keys`.
        table: rotations of the model.
        size: tokens that share a position, at least 1.
        neighbours: distances that stay as they are.
        scale: factor of the logits.

    Returns:
        [Hq, n, D] in the dtype of `queries`.
    """
    length, count, dtype = keys.shape[1], queries.shape[1], queries.dtype
    position = torch.arange(length, device=keys.device)
    turn = functools.partial(_turned, table=table)
    far_keys = turn(keys, position // size).to(dtype)
    first = max(0, length - count - neighbours + 1)  # nothing before it is a neighbour of any query
    near_keys = turn(keys[:, first:], position[first:]).to(dtype)
    own = position[length - count :]
    near = (turn(queries, own) * scale).to(dtype)
    far = (turn(queries, own // size + neighbours - neighbours // size) * scale).to(dtype)
    parts = []
    for begin in range(0, count, _QUERIES_AT_ONCE):
        rows = slice(begin, min(begin + _QUERIES_AT_ONCE, count))
        end = length - count + rows.stop
        start = max(first, length - count + begin - neighbours + 1)
        band = near_keys[:, start - first : end - first]
        parts.append(_merged(near[:, rows], far[:, rows], band, far_keys[:, :end], values[:, :end], neighbours))
    return torch.cat(parts, dim=1)


def _turned(x: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
    return rotate(x, *rotations(table, positions), table.interleaved)


def _merged(near: Tensor, far: Tensor, band: Tensor, keys: Tensor, values: Tensor, neighbours: int) -> Tensor:
    """Attention [Hq, n, D] of the last n queries; `band` holds the last keys, turned for neighbours."""
    (heads, count, dim), (num_kv_heads, length, width) = near.shape, (*keys.shape[:2], band.shape[1])
    query = torch.arange(length - count, length, device=near.device)[:, None]
    distance = query - torch.arange(length - width, length, device=near.device)
    out = torch.empty_like(near).view(num_kv_heads, -1, count, dim)
    for head in range(num_kv_heads):
        group = slice(head * len(out[head]), (head + 1) * len(out[head]))
        logits = far[group] @ keys[head].T
        nearby = near[group] @ band[head].T
        logits[..., length - width :] = torch.where(distance < neighbours, nearby, logits[..., length - width :])
        logits[..., length - width :].masked_fill_(distance < 0, float("-inf"))
        out[head] = torch.softmax(logits, dim=-1, dtype=torch.float32).to(values.dtype) @ values[head]
    return out.view(heads, count, dim)


class _Attention:
    """What runs inside the model."""

    def __init__(self, host: Host) -> None:
        self.rotary = learn_rotary(host, host.trained_window)
        self.table = self.rotary.table(host.trained_window)
        self.identity = self.rotary.identity(host.dtype)
        self.neighbours = min(NEIGHBOURS, host.trained_window // 4)
        self.reach = Reach(host.trained_window)
        self.size = 1

    def leave_raw(self, original: Callable[..., Any], x: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        """The rotary embedding: queries and keys stay as they are, and the group size is set."""
        self.size = group_size(self.reach.update(position_ids), self.reach.window, self.neighbours)
        return self.identity

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The attention function that Transformers calls."""
        rows = [
            self_extend_attention(q, k, v, self.table, self.size, self.neighbours, scaling)
            for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.stack(rows).transpose(1, 2), None


def _refuse_padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """The mask function that Transformers calls: causal attention needs none."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError("self_extend reads no padded batches: pass prompts one by one")


def attach_self_extend(
    model: nn.Module, on_prefill: Callable[[int, int], None] | None = None
) -> AbstractContextManager[None]:
    """See `methods.attach`; a batch is computed row by row."""
    host = inspect_model(model)
    if len(host.attention) < host.config.num_hidden_layers:
        raise NotImplementedError("self_extend does not serve models with sliding-window attention")
    return _entered(model, host, on_prefill)


@contextmanager
def _entered(model: nn.Module, host: Host, on_prefill: Callable[[int, int], None] | None) -> Iterator[None]:
    attention, own = _Attention(host), host.config._attn_implementation
    name = f"{_NAME}_{id(attention)}"  # several models may be entered at once
    with ExitStack() as stack:
        override(stack, host.decoder.rotary_emb, "forward", attention.leave_raw)
        stack.enter_context(dense(model, on_prefill))
        AttentionInterface.register(name, attention.attend)
        AttentionMaskInterface.register(name, _refuse_padding)
        stack.callback(AttentionInterface._global_mapping.pop, name, None)
        stack.callback(AttentionMaskInterface._global_mapping.pop, name, None)
        stack.callback(setattr, host.config, "_attn_implementation", own)
        host.config._attn_implementation = name
        yield
