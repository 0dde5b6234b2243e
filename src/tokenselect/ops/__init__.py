"""The operations and the choice, made once, of who computes them.

A backend is a module with `NAME`, `why_not`, `pool_queries`, `score_tokens`, `topk_tokens`, `sparse_attention`,
`quantize_rows`, what paged caches need, `quantize_into`, `write_rows`, `range_slots` and `fill_slots`, and what caches
in host memory need, `claim_rows` and `move_rows`; `ops.reference` is the definition of each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from tokenselect.ops import cpu, gpu, reference

_log = logging.getLogger(__name__)


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


class Backend(Protocol):
    """What a backend module offers; see `ops.reference` for what each function computes."""

    NAME: str
    why_not: Callable[[torch.device, torch.dtype, int], str | None]
    pool_queries: Callable[..., Tensor]
    score_tokens: Callable[..., tuple[Tensor, Tensor]]
    topk_tokens: Callable[..., Tensor]
    sparse_attention: Callable[..., Tensor]
    quantize_rows: Callable[..., tuple[Tensor, Tensor]]
    quantize_into: Callable[..., None]
    write_rows: Callable[..., None]
    fill_slots: Callable[..., None]
    range_slots: Callable[..., Tensor]
    claim_rows: Callable[..., tuple[Tensor, Tensor]]
    move_rows: Callable[..., None]


# Fastest first: `auto` takes the first that can run.
BACKENDS: dict[str, ModuleType] = {gpu.NAME: gpu, cpu.NAME: cpu, reference.NAME: reference}


def find_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend called `name`, or for `auto` the first that can run.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailable: the backend asked for by name cannot run for this device, dtype and head size.
    """
    if name == "auto":
        return _first_that_runs(device, dtype, head_dim)
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    backend = cast("Backend", BACKENDS[name])
    if reason := backend.why_not(device, dtype, head_dim):
        raise BackendUnavailable(f"backend {name!r} cannot run: {reason}; use backend='auto'")
    return backend


def _first_that_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    refused: list[str] = []
    for name, module in BACKENDS.items():
        backend = cast("Backend", module)
        reason = backend.why_not(device, dtype, head_dim)
        if reason is None:
            _log.info("backend %s%s", name, "".join(f"; not {other}" for other in refused))
            return backend
        refused.append(f"{name} ({reason})")
    raise BackendUnavailable(f"no backend can run: {'; '.join(refused)}")
