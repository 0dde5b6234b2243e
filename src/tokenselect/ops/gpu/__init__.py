"""The operations in Triton for NVIDIA and AMD GPUs. Results are those of `ops.reference` up to rounding.

Triton is imported with the first call, so that this package imports on a machine without it. Inside `torch.compile`
every operation is one opaque node.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenselect.ops.paging import PageTable
from tokenselect.ops.paging import fill_slots as fill_slots
from tokenselect.ops.paging import range_slots as range_slots
from tokenselect.ops.paging import write_rows as write_rows
from tokenselect.ops.reference import Distances

NAME = "gpu"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
_LARGEST_NORM = 2**15


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run there; None: it can."""
    if device.type != "cuda":
        return f"it runs on NVIDIA and AMD GPUs, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install tokenselect[gpu]"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if not 0 < head_dim <= 256:
        return f"it takes head sizes up to 256, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _OLDEST:
        return f"it needs compute capability 8.0 (Ampere) or later, not {capability[0]}.{capability[1]}"
    return None


def pool_queries(
    queries: Tensor, starts: Tensor, counts: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """See `ops.reference.pool_queries`."""
    from tokenselect.ops.gpu.around import pool_queries as pool

    return pool(queries, starts, counts, cos, sin, interleaved)


def quantize_rows(
    rows: Tensor, center: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.quantize_rows`."""
    from tokenselect.ops.gpu.around import quantize_rows as quantize

    integers, scales = quantize(rows, center)
    return (integers, scales) if out is None else (out[0].copy_(integers), out[1].copy_(scales))


def quantize_into(
    rows: Tensor, tokens: Tensor, centers: Tensor, owners: Tensor, integers: Tensor, scales: Tensor, into: Tensor
) -> None:
    """See `ops.reference.quantize_into`."""
    integers[into], scales[into] = quantize_rows(rows[tokens].float() - centers[owners])


def takes_norm(weight: Tensor) -> bool:
    """Whether `rms_norm` can multiply with this weight [size]."""
    return weight.is_cuda and weight.dtype in _DTYPES and weight.is_contiguous() and weight.shape[0] <= _LARGEST_NORM


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `ops.gpu.norm`."""
    from tokenselect.ops.gpu.norm import rms_norm as norm

    return norm(rows, weight, epsilon)


def attended_slots(
    chosen: Tensor,
    pages: PageTable,
    sequences: Sequence[int],
    windows: Sequence[int],
    ends: Sequence[int],
    num_sinks: int,
) -> tuple[Tensor, list[int]]:
    """See `ops.gpu.around`."""
    from tokenselect.ops.gpu.around import attended_slots as attended

    return attended(chosen, pages, sequences, windows, ends, num_sinks)


def claim_rows(slots: Tensor, places: Tensor, holders: Tensor, used: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.resident.claim_rows`."""
    from tokenselect.ops.gpu.resident import claim_rows as claim

    return claim(slots, places, holders, used, now)


def move_rows(
    keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor, key_rows: Tensor, value_rows: Tensor
) -> None:
    """See `ops.resident.move_rows`."""
    from tokenselect.ops.gpu.resident import move_rows as move

    move(keys, values, sources, targets, key_rows, value_rows)


def score_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    sequences: Tensor,
    candidates: Tensor,
    distances: Sequence[Distances],
    scale: float,
    context: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_center: Tensor | None = None,
    horizon: float = 0.0,
    prior: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.score_tokens`."""
    if torch.compiler.is_compiling():
        from tokenselect.ops.gpu import compiled

        votes: tuple[Tensor, Tensor] = compiled.score_tokens(
            queries,
            keys,
            pages.pages,
            pages.page_size,
            list(pages.padding),
            sequences,
            candidates,
            [view.cos for view in distances],
            [view.sin for view in distances],
            [view.run_size for view in distances],
            [view.run_start_loc for view in distances],
            distances[0].interleaved,
            scale,
            context,
            key_scales,
            key_center,
            horizon,
            prior,
        )
        return votes
    from tokenselect.ops.gpu.score import score_tokens as score

    given = queries, keys, pages, sequences, candidates, distances
    return score(*given, scale, context, key_scales, key_center, horizon, prior)


def topk_tokens(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    """See `ops.reference.topk_tokens`."""
    if torch.compiler.is_compiling():
        from tokenselect.ops.gpu import compiled

        chosen: Tensor = compiled.topk_tokens(votes, start_loc, k)
        return chosen
    from tokenselect.ops.gpu.topk import topk_tokens as topk

    return topk(votes, start_loc, k)


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start_loc: Tensor,
    slots: Tensor,
    slot_start_loc: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    interleaved: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.reference.sparse_attention`."""
    if torch.compiler.is_compiling():
        from tokenselect.ops.gpu import compiled

        rows = query_start_loc, slots, slot_start_loc
        extras = interleaved, softcap, sink_logits
        made: Tensor = compiled.sparse_attention(queries, keys, values, *rows, cos, sin, scale, *extras)
        return made if out is None else out.copy_(made)
    from tokenselect.ops.gpu.attention import sparse_attention as attend

    return attend(
        queries,
        keys,
        values,
        query_start_loc,
        slots,
        slot_start_loc,
        cos,
        sin,
        scale,
        interleaved=interleaved,
        softcap=softcap,
        sink_logits=sink_logits,
        out=out,
    )
