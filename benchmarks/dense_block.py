"""Dense attention of one block of queries after a long past: the kernels that TokenSelect is held against.

Each takes what a dense cache holds, keys rotated already, so rotation costs dense attention nothing here. The heads of
a group are queries of one key head, so that a key is loaded once for all of them: on the CPU several times faster
than torch's `enable_gqa`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

_LOGITS_AT_ONCE = 64 << 20  # bytes
_KEYS_AT_ONCE = 4096


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `scaled_dot_product_attention` runs on the CPU.

    The past, which needs no mask, and the block itself, which is causal, are attended apart and joined by their sums of
    exponentials, which only the function below the public one returns: a mask of all keys would cost more.

    Args:
        q: [Hq, C, D], rotated and scaled.
        k: [Hkv, T, D], rotated; the last C are the block's own.
        v: like `k`.

    Returns:
        [Hq, C, D].
    """
    heads, own, dim = q.shape
    before, group = k.shape[1] - own, heads // k.shape[0]
    past, past_sum = _flash(q.reshape(k.shape[0], -1, dim), k[:, :before], v[:, :before])
    k, v = (part[:, before:].repeat_interleave(group, dim=0) for part in (k, v))
    block, block_sum = _flash(q, k, v, is_causal=True)
    share = torch.sigmoid(past_sum.reshape(block_sum.shape) - block_sum)[..., None]
    return torch.lerp(block.float(), past.reshape(q.shape).float(), share).to(q.dtype)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Explicit products and a softmax over all keys, for as many queries at once as logits may take memory."""
    own, dim = q.shape[1:]
    out = torch.empty_like(q)
    grouped, attended = q.view(k.shape[0], -1, own, dim), out.view(k.shape[0], -1, own, dim)
    size = max(1, _LOGITS_AT_ONCE // (k.shape[1] * q.itemsize * grouped.shape[1]))
    future = _future(own, q.dtype)
    for head in range(k.shape[0]):
        for first in range(0, own, size):
            part = slice(first, first + size)
            logits = grouped[head, :, part].flatten(0, 1) @ k[head].T
            logits.view(grouped.shape[1], -1, k.shape[1])[..., -own:] += future[part]
            weights = torch.softmax(logits, dim=-1)
            attended[head, :, part] = (weights @ v[head]).view(grouped.shape[1], -1, dim)
    return out


def matmul_by_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Explicit products for all queries and some keys at once, whose logits stay in the cache; parts are joined."""
    own, dim = q.shape[1:]
    out = torch.empty_like(q).view(k.shape[0], -1, dim)
    grouped, future = q.reshape(k.shape[0], -1, dim), _future(own, q.dtype)
    bounds = [*range(0, k.shape[1] - own, _KEYS_AT_ONCE), k.shape[1] - own, k.shape[1]]
    for head in range(k.shape[0]):
        mean, total = torch.zeros(grouped.shape[1:]), torch.full(grouped.shape[1:2], -torch.inf)
        for first, last in pairwise(bounds):
            logits = grouped[head] @ k[head, first:last].T
            if last == k.shape[1]:
                logits.view(-1, own, own).add_(future)
            weights = torch.softmax(logits, dim=-1)
            # a weight is exp(logit - sum), so the largest of both gives the sum without another pass of exponentials
            part_sum = logits.amax(-1).float() - weights.amax(-1).float().log()
            mean.lerp_((weights @ v[head, first:last]).float(), torch.sigmoid(part_sum - total)[:, None])
            total = torch.logaddexp(total, part_sum)
        out[head] = mean
    return out.view(q.shape)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "SDPA": sdpa,
    "matmul": matmul,
    "matmul by keys": matmul_by_keys,
}


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = flash(q[None], k[None], v[None], is_causal=is_causal, scale=1.0)
    return out[0], total[0]


def _future(own: int, dtype: torch.dtype) -> Tensor:
    """What a block's logits with its own keys [queries, keys] get added."""
    return torch.full((own, own), -torch.inf, dtype=dtype).triu(1)
