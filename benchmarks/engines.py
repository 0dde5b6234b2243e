"""Who reads a prompt in `benchmarks.latency`: Transformers with a method, plain Transformers, llama.cpp."""

from __future__ import annotations

from typing import Protocol

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from benchmarks.llama import Llama
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.cache_name import CACHE
from tokenselect.measure import Run, read_and_write, warm_up
from tokenselect.models import LoadedModel
from tokenselect.ops import cpu

ENGINES = ("tokenselect", "streaming", "dense", "llama.cpp bf16", "llama.cpp q8_0")
BLOCK = 512
_PIECES_AT_ONCE = 8


class Engine(Protocol):
    """One way to run the model.

    Attributes:
        version: what computes.
        is_quadratic: every token attends all before it.
    """

    version: str
    is_quadratic: bool

    def warm_up(self, ids: Tensor) -> None:
        """Do, unmeasured, what is done on the first run only."""

    def read(self, ids: Tensor, steps: int) -> Run:
        """Read a prompt [1, tokens] and decode."""

    def fill(self, ids: Tensor) -> None:
        """Let the cache hold so many tokens, read in pieces of 512 that do not see each other; quadratic ones only."""

    def read_after(self, depth: int, ids: Tensor, steps: int) -> Run:
        """Read more, and decode, after the first `depth` tokens of what `fill` has read."""

    def close(self) -> None:
        """Give back memory and processes."""


def start(name: str, loaded: LoadedModel, num_tokens: int) -> Engine:
    """The engine with this name of `ENGINES`, with room for so many tokens."""
    if name.startswith("llama.cpp"):
        return LlamaEngine(Llama(name.split()[1], num_tokens, torch.get_num_threads()))
    return DenseEngine(loaded, name) if name == "dense" else TransformersEngine(loaded, name)


class TransformersEngine:
    """A method of ours in Transformers, with its defaults."""

    is_quadratic = False

    def __init__(self, loaded: LoadedModel, method: str) -> None:
        self.loaded, self.method, self.config = loaded, method, TokenSelectConfig()
        self.version = f"kernels {cpu.instruction_set()}"

    def warm_up(self, ids: Tensor) -> None:
        """See `Engine`."""
        warm_up(self.loaded, ids, self.method, self.config)

    def read(self, ids: Tensor, steps: int) -> Run:
        """See `Engine`."""
        return read_and_write(self.loaded, ids, self.method, self.config, steps)

    def fill(self, ids: Tensor) -> None:
        """Nothing: what a block costs at its depth is seen while the whole prompt is read."""

    def read_after(self, depth: int, ids: Tensor, steps: int) -> Run:
        """See `fill`."""
        raise NotImplementedError(f"{self.method} reads the whole prompt")

    def close(self) -> None:
        """See `Engine`."""


class DenseEngine(TransformersEngine):
    """Transformers as it is: SDPA, the prompt in one pass."""

    is_quadratic = True

    def __init__(self, loaded: LoadedModel, method: str) -> None:
        super().__init__(loaded, method)
        self.version = f"transformers {transformers.__version__} {loaded.model.config._attn_implementation}"
        self._cache = DynamicCache(config=loaded.model.config)

    @torch.no_grad()
    def fill(self, ids: Tensor) -> None:
        """See `Engine`: pieces are rows of a batch, at their true positions; their keys and values are put in line."""
        self._cache = DynamicCache(config=self.loaded.model.config)
        positions = torch.arange(ids.shape[1])
        for first in range(0, ids.shape[1], _PIECES_AT_ONCE * BLOCK):
            some = slice(first, first + _PIECES_AT_ONCE * BLOCK)
            pieces, cache = ids[0, some].view(-1, BLOCK), DynamicCache(config=self.loaded.model.config)
            own = positions[some].view(-1, BLOCK)
            self.loaded.model(pieces, **{CACHE: cache}, position_ids=own, logits_to_keep=1)
            for index, layer in enumerate(cache.layers):
                self._cache.update(*(_in_line(part) for part in (layer.keys, layer.values)), index)

    def read_after(self, depth: int, ids: Tensor, steps: int) -> Run:
        """See `Engine`."""
        self._cache.crop(depth - self._cache.get_seq_length())
        return read_and_write(self.loaded, ids, self.method, self.config, steps, self._cache)

    def close(self) -> None:
        """See `Engine`."""
        del self._cache


class LlamaEngine:
    """llama.cpp with weights made from the same ones."""

    is_quadratic = True

    def __init__(self, llama: Llama) -> None:
        self._llama, self.version = llama, llama.version

    def warm_up(self, ids: Tensor) -> None:
        """See `Engine`."""
        self.read(ids[:, : 2 * BLOCK], 2)

    def read(self, ids: Tensor, steps: int) -> Run:
        """See `Engine`."""
        return self._llama.read_and_write(ids[0].tolist(), steps)

    def fill(self, ids: Tensor) -> None:
        """See `Engine`."""
        self._llama.fill(ids[0].tolist())

    def read_after(self, depth: int, ids: Tensor, steps: int) -> Run:
        """See `Engine`."""
        return self._llama.read_and_write(ids[0].tolist(), steps, depth)

    def close(self) -> None:
        """See `Engine`."""
        self._llama.close()


def _in_line(pieces: Tensor) -> Tensor:
    """[pieces, H, T, D] as [1, H, pieces * T, D]."""
    return pieces.transpose(0, 1).flatten(1, 2)[None]
