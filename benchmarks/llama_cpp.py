"""llama.cpp, timed: run by `.venv-llama`, whose Python has nothing of ours; see `benchmarks.llama`.

One JSON object a line comes in on stdin, one goes out on stdout:

    {"do": "load", "path": FILE, "n_ctx": N, "threads": N}      {"version": ..., "system": ...}
    {"do": "read", "ids": [...]}                                {"seconds": S, "token": ID}
    {"do": "write", "steps": N}                                 {"seconds": [...], "tokens": [...]}
    {"do": "fill", "ids": [...]}                                {}
    {"do": "cut", "length": N}                                  {}

"read" goes on after what the cache holds. "fill" forgets it and reads the tokens in pieces that do not see each other,
each at its true positions, which is cheap: the cache is then as full as after reading them together. "cut" forgets all
but the first tokens.
"""

from __future__ import annotations

# The folder of this file comes first on the path, where this very file would be found instead of the package.
import sys

sys.path.pop(0)

import ctypes
import json
import time
from typing import Any

import llama_cpp
import numpy as np

_BATCH = 512  # what llama.cpp computes at once (n_ubatch) by default
_SEQUENCE, _SCRATCH = 0, 1


class Session:
    """A model with a cache of fixed size; flash attention on, keys and values in float16, RoPE as trained."""

    def __init__(self, path: str, n_ctx: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = n_ctx, _BATCH, _BATCH, 2
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.kv_unified = True  # one buffer for both sequences, so that "fill" can hand tokens over
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path} with a context of {n_ctx}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self.num_words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.token = 0

    def cut(self, length: int) -> None:
        """Keep the first tokens only."""
        llama_cpp.llama_memory_seq_rm(self.memory, _SEQUENCE, length, -1)

    def read(self, ids: list[int]) -> float:
        """Seconds until the next token is known."""
        start = llama_cpp.llama_memory_seq_pos_max(self.memory, _SEQUENCE) + 1
        started = time.perf_counter()
        for first in range(0, len(ids), _BATCH):
            self._decode(ids[first : first + _BATCH], start + first, _SEQUENCE, first + _BATCH >= len(ids))
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        self.token = int(np.ctypeslib.as_array(logits, (self.num_words,)).argmax())
        return time.perf_counter() - started

    def write(self, steps: int) -> tuple[list[float], list[int]]:
        """Seconds of each greedy step, and the tokens that came."""
        seconds, tokens = [], []
        for _ in range(steps):
            seconds.append(self.read([self.token]))
            tokens.append(self.token)
        return seconds, tokens

    def fill(self, ids: list[int]) -> None:
        """Read pieces as a sequence of their own and hand each over to the main one."""
        self.cut(0)
        for first in range(0, len(ids), _BATCH):
            self._decode(ids[first : first + _BATCH], first, _SCRATCH, False)
            llama_cpp.llama_memory_seq_cp(self.memory, _SCRATCH, _SEQUENCE, -1, -1)
            llama_cpp.llama_memory_seq_rm(self.memory, _SCRATCH, -1, -1)

    def _decode(self, ids: list[int], start: int, sequence: int, wants_logits: bool) -> None:
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        ctypes.memmove(batch.token, (ctypes.c_int32 * count)(*ids), 4 * count)
        for i in range(count):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = start + i, 1, sequence, 0
        batch.logits[count - 1] = int(wants_logits)
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {code}")


def load(path: str, n_ctx: int, threads: int) -> tuple[Session, dict[str, Any]]:
    """A session, and what is told of it."""
    system = llama_cpp.llama_print_system_info().decode()
    return Session(path, n_ctx, threads), {"version": llama_cpp.__version__, "system": system}


def answer(session: Session, do: str, **given: Any) -> dict[str, Any]:
    """One request after the first one."""
    if do == "read":
        return {"seconds": session.read(**given), "token": session.token}
    if do == "write":
        seconds, tokens = session.write(**given)
        return {"seconds": seconds, "tokens": tokens}
    {"fill": session.fill, "cut": session.cut}[do](**given)
    return {}


def _quiet(level: int, text: bytes, data: object) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CALLBACK = llama_cpp.llama_log_callback(_quiet)

if __name__ == "__main__":
    llama_cpp.llama_log_set(_CALLBACK, None)
    request = json.loads(sys.stdin.readline())
    current, facts = load(request["path"], request["n_ctx"], request["threads"])
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(current, **json.loads(line))), flush=True)
