"""What the host knows of tensors on the device: read back once, however many layers ask.

Grids and buffers need lengths on the host. The tensors that hold them are shared by all layers of a forward pass, so
the first layer waits for the device once and the others do not.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_MOST_KNOWN = 1024
_known: OrderedDict[int, tuple[weakref.ref[Tensor], int, list[int]]] = OrderedDict()


def on_host(tensor: Tensor) -> list[int]:
    """The values of an integer tensor, flattened; from the device only if it is new or was changed."""
    if tensor.device.type == "cpu":
        values: list[int] = tensor.flatten().tolist()
        return values
    entry = _known.get(id(tensor))
    if entry is not None and entry[0]() is tensor and entry[1] == _version(tensor):
        with suppress(KeyError):  # another thread may have dropped it
            _known.move_to_end(id(tensor))
        return entry[2]
    return remember(tensor, tensor.flatten().tolist())


def is_known(tensor: Tensor) -> bool:
    """Whether `on_host` answers without waiting for the device."""
    entry = _known.get(id(tensor))
    on_cpu = tensor.device.type == "cpu"
    return on_cpu or (entry is not None and entry[0]() is tensor and entry[1] == _version(tensor))


def remember(tensor: Tensor, values: list[int]) -> list[int]:
    """Note what a tensor on the device holds, so that nobody needs to ask it."""
    _known[id(tensor)] = (weakref.ref(tensor), _version(tensor), values)
    while len(_known) > _MOST_KNOWN:
        _known.popitem(last=False)
    return values


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 values on the device; equal ones are copied there once. Never write to the result."""
    return _uploaded(tuple(values), device)


@functools.lru_cache(maxsize=256)
def _uploaded(values: tuple[int, ...], device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    if device.type != "cpu":
        remember(tensor, list(values))
    return tensor


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which nobody may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def precision(operand: Tensor) -> str:
    """How `tl.dot` multiplies: float32 in three parts of matrix units, on AMD one by one; others as they are."""
    if operand.dtype != torch.float32:
        return "tf32"
    return "tf32x3" if torch.version.hip is None else "ieee"


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options: from Hopper on a kernel may begin while the one before it ends."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


def has_halves(dim: int, half: int, interleaved: bool) -> bool:
    """Whether vectors are two halves that turn together, each as long as a tile may be."""
    return not interleaved and 2 * half == dim and half >= 16 and half & (half - 1) == 0
