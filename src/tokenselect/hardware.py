"""What the processor is good at, and memory as it likes it."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_LARGEST_THAT_COUNTS = 31 << 20


def half_is_slow(device: torch.device) -> bool:
    """Whether matrix products in bf16 and fp16 are many times slower than in float32: an x86 CPU without AVX-512."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Let the system map a fresh tensor's memory in huge pages, of which a processor can look up many more at once.

    Only Linux does so when asked; a tensor that is small, or on another device, stays as it is.

    Returns:
        The same tensor.
    """
    size = tensor.numel() * tensor.element_size()
    if sys.platform == "linux" and tensor.device.type == "cpu" and size >= 2 * _HUGE_PAGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that GPUs read and write by themselves; ordinary memory where there is none.

    PyTorch's own pinned memory takes the next power of 2 of bytes, up to twice what is needed.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size or not torch.cuda.is_available():
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, size)
    room = (ctypes.c_char * size).from_buffer(pages)
    memory = advise_huge_pages(torch.frombuffer(room, dtype=dtype))  # holds `room`, and that holds `pages`
    memory.zero_()  # by all threads; page by page when it is pinned takes several times as long
    cuda: Any = torch.cuda
    cuda.check_error(cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
    weakref.finalize(room, _unpin, memory.data_ptr(), pages).atexit = False
    return memory.view(tuple(shape))


def _unpin(address: int, pages: mmap.mmap) -> None:
    """Give memory back, `pages` after this; kernels that use it end first."""
    cuda: Any = torch.cuda
    cuda.synchronize()
    cuda.cudart().cudaHostUnregister(address)


def keep_freed_memory(device: torch.device) -> None:
    """Let memory that a layer frees serve the next one, where it would go back to the system and be fetched anew.

    The C library of Linux (glibc) gives freed memory back above a threshold that grows with the largest block, up to
    32 MB, that was ever freed (mallopt(3), M_MMAP_THRESHOLD). A chunk of a prompt has some 40 MB of temporaries in a
    layer, and to fetch them page by page takes as long as a tenth of the layer. The call itself holds no memory.
    """
    if sys.platform == "linux" and device.type == "cpu":
        torch.empty(_LARGEST_THAT_COUNTS, dtype=torch.uint8)


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Lay a model's weights on the CPU one after the other, in memory that the system may map in huge pages.

    A decode step reads every weight once, and as fast as memory can be read; most of them are smaller than a huge page.
    """
    plain = [weight for weight in model.parameters() if type(weight.data) is Tensor]  # quantised ones are not
    weights = [weight for weight in plain if weight.device.type == "cpu" and weight.is_contiguous()]
    for dtype in {weight.dtype for weight in weights}:
        own = [weight for weight in weights if weight.dtype == dtype]
        room = advise_huge_pages(torch.empty(sum(_padded(weight) for weight in own), dtype=dtype))
        at = 0
        for weight in own:
            place = room[at : at + weight.numel()].view(weight.shape)
            place.copy_(weight)
            weight.data = place
            at += _padded(weight)


def _padded(weight: Tensor) -> int:
    """Elements that a weight takes so that the next one begins where a line of the cache does."""
    return -(-weight.numel() // 64) * 64
