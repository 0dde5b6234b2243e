"""How fast this machine reads memory from one end to the other: the yardstick of operations that have to read it all.

Reductions that do nothing else compete, in torch and in libc; all of them end at about the same rate, which shows that
memory, not arithmetic, is what limits them. The fastest one on the buffers at hand is the yardstick.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_THREADS = ThreadPoolExecutor(64)
_TRIALS = 3
_LEAST_BYTES = 1 << 20


def _memcmp(words: Tensor) -> None:
    """Compare a buffer with itself: each byte comes from memory once."""
    count, size = torch.get_num_threads(), words.numel() * 8
    part = size // count
    starts = [words.data_ptr() + i * part for i in range(count)]
    # ctypes gives the interpreter's lock away, so the parts run at once
    list(_THREADS.map(lambda start: _LIBC.memcmp(start, start, part), starts))


READERS: dict[str, Callable[[Tensor], object]] = {
    "torch sum of int64": lambda words: words.sum(),
    "torch sum of int64 by 64 rows": lambda words: words[: words.numel() // 64 * 64].view(64, -1).sum(1),
    "torch sum of float32": lambda words: words.view(torch.float32).sum(),
    "torch maximum of int64": lambda words: words.amax(),
    "torch maximum of float32": lambda words: words.view(torch.float32).amax(),
    "libc memcmp": _memcmp,
}


class StreamReader:
    """Reads pools of buffers as fast as can be, with torch's number of threads.

    Args:
        pools: contiguous tensors.
        most_bytes: of each pool at most so many are read.
        at_once: bytes that one read takes of all pools together.

    Attributes:
        num_bytes: of one read.
        name: the fastest of `READERS` here.
        rates: bytes per second of each of them, best of three.
    """

    def __init__(self, pools: Sequence[Tensor], most_bytes: int, at_once: int) -> None:
        self._words = [_words(pool, most_bytes) for pool in pools if pool.nbytes >= _LEAST_BYTES]
        self._share = min(1.0, at_once / sum(words.nbytes for words in self._words))
        self.num_bytes = sum(part.nbytes for part in self._parts(0.0))
        self.rates = {name: self.num_bytes / min(self._time(name) for _ in range(_TRIALS)) for name in READERS}
        self.name = max(self.rates, key=lambda name: self.rates[name])

    def read(self, start: float = 0.0) -> float:
        """Seconds that a read takes; it begins at this share of each pool and goes around."""
        return self._time(self.name, start)

    def _parts(self, start: float) -> list[Tensor]:
        return [part for words in self._words for part in _around(words, start, self._share) if part.numel() >= 64]

    def _time(self, name: str, start: float = 0.0) -> float:
        reader = READERS[name]
        parts = self._parts(start)
        started = time.perf_counter()
        for part in parts:
            reader(part)
        return time.perf_counter() - started


def _words(pool: Tensor, most_bytes: int) -> Tensor:
    flat = pool.view(-1).view(torch.uint8)[:most_bytes]
    return flat[: flat.numel() // 8 * 8].view(torch.int64)


def _around(words: Tensor, start: float, share: float) -> tuple[Tensor, Tensor]:
    first, count = int(words.numel() * start) // 64 * 64, max(64, int(words.numel() * share))
    to_the_end = words[first : first + count]
    return to_the_end, words[: count - to_the_end.numel()]
