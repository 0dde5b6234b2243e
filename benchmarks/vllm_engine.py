"""One vLLM engine in a process of its own, timed: stock, or with TokenSelect.

`Engine` is the handle that the measuring process holds; what runs in the child gets a `Work` and answers with `Reply`.
Both engines get the same weights, threads, token budget and room for keys and values. Everything else is what a user
gets: for TokenSelect the settings of `tokenselect serve`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

NAMES = ("stock", "tokenselect")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
_KV_BYTES = 4 << 30  # 186,000 tokens of the embedded model: eight requests of 16,000, or one of 64,000


class EngineError(RuntimeError):
    """The engine did not start, or ended while it was measured."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How an engine is started.

    Attributes:
        name: of `NAMES`.
        model: folder of the model.
        max_model_len: tokens of a request, prompt and answer.
        prefix_caching: whether keys and values of one request are kept for the next.
        chunk: tokens of one forward pass.
        threads: of torch and OpenMP.
        eager: whether vLLM runs the model without compiling it first.
    """

    name: str
    model: str
    max_model_len: int
    prefix_caching: bool
    chunk: int
    threads: int
    eager: bool

    def arguments(self) -> dict[str, Any]:
        """What vLLM's `LLM` is called with."""
        given: dict[str, Any] = {
            "model": self.model,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "enforce_eager": self.eager,
            "max_model_len": self.max_model_len,
            "max_num_seqs": 8,
            "max_num_batched_tokens": self.chunk,
            "kv_cache_memory_bytes": _KV_BYTES,
            "enable_prefix_caching": self.prefix_caching,
            "enable_chunked_prefill": True,
        }
        if self.name == "stock":  # without this its table of rotations would end at the trained window
            return given | {"hf_overrides": {"max_position_embeddings": self.max_model_len}}
        from tokenselect.integrations.vllm import SCHEDULER

        ours = {"attention_backend": "CUSTOM", "scheduler_cls": SCHEDULER, "async_scheduling": False}
        return given | ours | {"block_size": 256}


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts that are given at the same time, and how many tokens each is answered with."""

    prompts: list[list[int]]
    tokens: int


class Answer(NamedTuple):
    """One request: seconds from its arrival to each of its tokens, and prompt tokens found in the prefix cache."""

    seconds: list[float]
    cached: int


class Engine:
    """A running engine; leaving the context ends its process."""

    def __init__(self, settings: Settings) -> None:
        os.environ.update(_ENVIRONMENT, OMP_NUM_THREADS=str(settings.threads))
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings))
        self._process.start()
        theirs.close()
        self.threads: int = self._receive()

    def answer(self, work: Work) -> list[Answer]:
        """Let the engine answer, one `Answer` for each prompt."""
        self._connection.send(work)
        answers: list[Answer] = self._receive()
        return answers

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise EngineError("the engine ended; what it said stands above") from None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()  # the child reads the end of its work
        self._process.join(60 if kind is None else 5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, settings: Settings) -> None:
    """The child: answer what comes until the other side hangs up."""
    import torch
    from vllm import LLM

    llm = LLM(**settings.arguments())
    try:
        connection.send(torch.get_num_threads())
        while True:
            connection.send(_answer(llm.llm_engine, connection.recv()))
    except (EOFError, ConnectionError):
        llm.llm_engine.engine_core.shutdown()


def _answer(engine: Any, work: Work) -> list[Answer]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=work.tokens, ignore_eos=True, detokenize=False)
    names = [str(number) for number in range(len(work.prompts))]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cached = dict.fromkeys(names, 0)
    started = time.perf_counter()
    for name, prompt in zip(names, work.prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter() - started
            new = len(output.outputs[0].token_ids) - len(seconds[output.request_id])
            seconds[output.request_id] += [now] * new
            cached[output.request_id] = output.num_cached_tokens or 0
    return [Answer(seconds[name], cached[name]) for name in names]
