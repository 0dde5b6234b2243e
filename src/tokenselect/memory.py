"""Memory: what a context will take, what there is, and what a run has taken at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import Any

import psutil
import torch

from tokenselect.config import TokenSelectConfig

# Activations and the cache's growth need some too: keys and values may take this share of what is free.
_KV_SHARE = 0.9


def kv_bytes(config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one sequence.

    Args:
        config: the model's Transformers config.
        num_tokens: tokens of the sequence.
        dtype: of keys and values.

    Returns:
        2 * KV heads * head size * bytes per number * tokens, summed over the layers; a sliding-window layer
        keeps its window only.
    """
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = min(num_tokens, getattr(text, "sliding_window", None) or num_tokens)
    kept = sum(window if kind == "sliding_attention" else num_tokens for kind in kinds)
    return int(2 * heads * head_dim * dtype.itemsize * kept)


def context_bytes(config: Any, num_tokens: int, dtype: torch.dtype, settings: TokenSelectConfig | None = None) -> int:
    """Bytes of everything that is kept of one sequence where the model runs: keys, values, and what scoring reads.

    Args:
        config: the model's Transformers config.
        num_tokens: tokens of the sequence.
        dtype: of keys and values.
        settings: those of the selection; None: there is none.

    Returns:
        `kv_bytes`, with `kv_offload` those of the resident rows alone, and for an int8 copy of the keys half a byte
        per byte of 16-bit keys and a scale.
    """
    kept = num_tokens
    if settings is not None and settings.kv_offload:
        kept = min(num_tokens, settings.num_resident_tokens)
    total = kv_bytes(config, kept, dtype)
    if settings is None or settings.score_dtype != "int8" or not settings.num_selected_tokens:
        return total
    if settings.covers(num_tokens, num_tokens):
        return total
    text = config.get_text_config(decoder=True)
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return total + kv_bytes(config, num_tokens, torch.int8) * (head_dim + 4) // (2 * head_dim)


def available_memory(device: torch.device) -> int:
    """Free bytes on a device; on the CPU what can be had without swapping, a container's limit included."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return max(free, 0)


def fits(
    config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device, settings: TokenSelectConfig | None = None
) -> bool:
    """Whether there is memory for a context of so many tokens; arguments as in `check_memory`."""
    needs = _needs(config, num_tokens, dtype, device, settings)
    return all(needed <= _usable(place) for place, needed in needs)


def _needs(
    config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device, settings: TokenSelectConfig | None
) -> list[tuple[torch.device, int]]:
    """Bytes that a context takes on each device."""
    needs = [(device, context_bytes(config, num_tokens, dtype, settings))]
    if settings is not None and settings.kv_offload:
        needs.append((torch.device("cpu"), kv_bytes(config, num_tokens, dtype)))
    return needs


def check_memory(
    config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device, settings: TokenSelectConfig | None = None
) -> None:
    """Refuse a context that does not fit, before anything is computed.

    Args:
        config: the model's Transformers config.
        num_tokens: tokens to cache from now on: the prompt's and the new ones.
        dtype: of keys and values.
        device: where they lie.
        settings: those of the selection; None: there is none.

    Raises:
        ValueError: not enough memory; says how much is needed and how many tokens would fit.
    """
    if fits(config, num_tokens, dtype, device, settings):
        return
    needs = _needs(config, num_tokens, dtype, device, settings)
    needed, usable = next((needed, _usable(place)) for place, needed in needs if needed > _usable(place))
    low, high = 0, num_tokens  # the largest number of tokens that fits lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(config, middle, dtype, device, settings) else (low, middle)
    raise ValueError(
        f"{num_tokens:,} tokens need {readable(needed)} of memory for their keys and values and what scoring reads, "
        f"but {readable(usable)} can be used: {low:,} would fit; shorten the document or lower max_new_tokens"
    )


def _usable(device: torch.device) -> int:
    return int(available_memory(device) * _KV_SHARE)


def readable(num_bytes: float) -> str:
    """A number of bytes for people: "1.5 GB"; units of 1000."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


class PeakMemory:
    """The most memory used since this object was made; weights, Python and torch are part of it.

    Attributes:
        scope: how it is measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self.scope = "memory that torch allocated on the GPU during the call"
        elif _reset_high_water_mark():
            self.scope = "resident memory of the process during the call (VmHWM)"
        else:
            self.scope = "resident memory of the process since its start"

    def read(self) -> int:
        """Bytes."""
        if self._cuda is not None:
            return int(torch.cuda.max_memory_allocated(self._cuda))
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        return _peak_since_start()


def settled_memory() -> int:
    """Resident bytes of the process after the free ones were given back to the system, if possible."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5); Linux only
    except OSError:
        return False
    return True


def _peak_since_start() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024
