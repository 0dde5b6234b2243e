"""LLM: load a model, let it read a long prompt, stream its answer; several turns on one KV cache."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from transformers import Cache, DynamicCache

from tokenselect.config import TokenSelectConfig
from tokenselect.generation import Generation
from tokenselect.memory import PeakMemory, check_memory
from tokenselect.methods import attach, method_config
from tokenselect.models import LoadedModel, load_model
from tokenselect.sampling import Sampling, SamplingOptions
from tokenselect.stats import Counts, Stats, cached_bytes, rates
from tokenselect.trace.answers import trace_answer
from tokenselect.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import Unpack

    from tokenselect.trace.record import Trace

    Prompt = str | Sequence[Mapping[str, str]]
    OnPrefill = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written; `interrupted` if Ctrl-C ended it early."""

    text: str
    stats: Stats
    interrupted: bool = False


@dataclass(slots=True)
class _Context:
    """A KV cache and the tokens that it holds."""

    cache: Cache
    ids: list[int] = field(default_factory=list)

    def crop_to(self, length: int) -> bool:
        """Forget all but the first tokens; False if a layer cannot (a sliding window has moved on)."""
        try:
            for layer in self.cache.layers:
                # After an interruption some layers may be ahead of others.
                if (excess := layer.get_seq_length() - length) > 0:
                    layer.crop(-excess)
        except RuntimeError:
            return False
        self.ids = self.ids[:length]
        return True

    def update_ids(self, ids: list[int]) -> None:
        """Note which of `ids` the cache holds now: an interrupted or last token is not among them."""
        self.ids = ids[: min((layer.get_seq_length() for layer in self.cache.layers), default=0)]


class LLM:
    """A language model that reads contexts far beyond its trained window.

    The model itself is changed only while an answer is written or a conversation is open. One answer at a
    time.

    Args:
        model: None for the embedded model, a folder, a GGUF file, a name on the Hugging Face hub (see
            `models.load_model`), or a `LoadedModel` to share its weights.
        method: "tokenselect"; "streaming": sinks and local tokens alone at the same budget; "dense".
        config: the settings; `TokenSelectConfig()` by default.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: a torch device.
        allow_pickle: also load weights that exist only as pickles.
        trust_remote_code: run Python code that comes with the model.
        progress: called with one sentence when something slow starts: a conversion or a download.
        trace: record what every layer selects for every token of an answer, which takes longer.

    Attributes:
        stats: numbers of the last answer; None before the first one.
        trace: what was read for the last answer; None before the first one, or where it is not recorded.

    Raises:
        ModelError: the model cannot be loaded.
        ValueError: no such method, one that a trace cannot record, or the budget is larger than the trained window.
        NotImplementedError: the method cannot serve this model.
        BackendUnavailable: a backend asked for by name cannot run.

    Example:
        llm = LLM()
        for piece in llm.stream([{"role": "user", "content": document + question}]):
            print(piece, end="")
    """

    def __init__(
        self,
        model: str | Path | LoadedModel | None = None,
        method: str = "tokenselect",
        config: TokenSelectConfig | None = None,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        progress: Callable[[str], None] | None = None,
        trace: bool = False,
    ) -> None:
        if trace and method != "tokenselect":
            raise ValueError(f"a trace records what is selected: method must be 'tokenselect', got {method!r}")
        self.config = config or TokenSelectConfig()
        self.method = method
        self._settings = method_config(method, self.config)  # before the model, which takes time
        self.loaded = (
            model
            if isinstance(model, LoadedModel)
            else load_model(
                model,
                dtype=dtype,
                device=device,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        )
        attach(self.loaded.model, method, self.config)  # refuses what cannot work, and changes nothing
        if self._settings is not None:
            self._settings = self._settings.for_window(self.loaded.trained_window)
        self.stats: Stats | None = None
        self.trace: Trace | None = None
        self._recorder = Recorder(self.loaded.trained_window) if trace else None
        self._running: Generation | None = None
        self._lock = Lock()
        self._users = 0
        self._attached = ExitStack()

    @property
    def budget(self) -> int | None:
        """The most tokens that a query attends which selects; None for dense attention."""
        return None if self._settings is None else self._settings.budget

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens that the model will read.

        Args:
            prompt: text, taken as it is, or chat messages for the tokenizer's chat template.

        Raises:
            ValueError: it is empty, or the template is missing or refuses the messages.
        """
        tokenizer = self.loaded.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer(prompt, verbose=False)["input_ids"]
        else:
            ids = self._apply_template(list(prompt))
        if not ids:
            raise ValueError("the prompt is empty")
        return list(ids)

    def _apply_template(self, messages: list[Mapping[str, str]]) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if not tokenizer.chat_template:
            raise ValueError(f"{self.loaded.name} has no chat template: pass text as it is (--raw)")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program and may fail in any way
            raise ValueError(f"the chat template of {self.loaded.name} fails: {error}") from error
        # A template writes the special tokens itself.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def stream(
        self, prompt: Prompt, *, on_prefill: OnPrefill | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Generator[str]:
        """Answer a prompt piece by piece.

        Args:
            prompt: text, taken as it is, or chat messages (the document goes before the question).
            on_prefill: called with (tokens read, tokens to read) in the thread that generates.
            **sampling: see `Sampling`.

        Returns:
            Pieces of text, to be joined without anything between; close it to stop early. After Ctrl-C the
            rest of what was written comes, then `KeyboardInterrupt`. `stats` is set in any case.

        Raises:
            ValueError: an empty prompt, a wrong option, or not enough memory for the context.
        """
        return self._start(self.encode(prompt), self._new_context(), Sampling(**sampling), on_prefill)

    def generate(
        self, prompt: Prompt, *, on_prefill: OnPrefill | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Answer:
        """Answer a prompt; arguments and errors are those of `stream`.

        Returns:
            The answer; after Ctrl-C what was written until then.
        """
        return self.collect(self.stream(prompt, on_prefill=on_prefill, **sampling))

    def chat(self, system: str | None = None) -> Conversation:
        """A conversation; close it, or use it in a `with` statement, to give the model back as it was."""
        return Conversation(self, system)

    def collect(self, stream: Generator[str]) -> Answer:
        """Join what a stream gives; Ctrl-C ends it."""
        pieces, interrupted = [], False
        try:
            with closing(stream):
                for piece in stream:
                    pieces.append(piece)
        except KeyboardInterrupt:
            interrupted = True
        assert self.stats is not None
        return Answer("".join(pieces), self.stats, interrupted)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the method in the model; nested uses share it."""
        if not self._users:
            self._attached.enter_context(self._attach())
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._attached.close()

    def _attach(self) -> AbstractContextManager[Any]:
        return attach(self.loaded.model, self.method, self.config, self._report, self._recorder)

    def _report(self, done: int, total: int) -> None:
        if self._running is not None:
            self._running.report(done, total)

    def _new_context(self) -> _Context:
        return _Context(DynamicCache(config=self.loaded.model.config))

    def _start(
        self, ids: list[int], context: _Context, sampling: Sampling, on_prefill: OnPrefill | None
    ) -> Generator[str]:
        """Check what can be checked now; the rest runs when the first piece is asked for."""
        model, kept = self.loaded.model, _shared_prefix(context.ids, ids)
        num_tokens = len(ids) + sampling.max_new_tokens - kept
        check_memory(model.config, num_tokens, model.dtype, model.device, self._settings)
        return self._answer(ids, context, sampling, on_prefill)

    def _answer(
        self, ids: list[int], context: _Context, sampling: Sampling, on_prefill: OnPrefill | None
    ) -> Generator[str]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this LLM is writing another answer: close that stream first")
        try:
            with self.attached():
                start, peak = time.perf_counter(), PeakMemory(self.loaded.model.device)
                cached = self._keep_prefix(context, ids)
                before = Counts.of(context.cache)
                if self._recorder is not None:
                    self._recorder.begin(len(ids) - 1)
                run = self._running = Generation(self.loaded, ids, context.cache, sampling, on_prefill)
                try:
                    yield from run.pieces()
                finally:
                    context.update_ids(ids + run.tokens)
                    counts = Counts.of(context.cache).since(before)
                    self.stats = self._measure(run, start, len(ids), cached, counts, context.cache, peak)
                    if self._recorder is not None:
                        known = self.loaded.tokenizer, self.loaded.name, self._settings or self.config
                        self.trace = trace_answer(self._recorder, *known, ids, run.tokens)
        finally:
            self._running = None
            self._lock.release()

    def _keep_prefix(self, context: _Context, ids: list[int]) -> int:
        """Let the context hold a prefix of `ids` and nothing else; how many tokens that saves."""
        kept = _shared_prefix(context.ids, ids)
        if not context.crop_to(kept):
            fresh = self._new_context()
            context.cache, context.ids = fresh.cache, fresh.ids
        return len(context.ids)

    def _measure(
        self,
        run: Generation,
        start: float,
        prompt: int,
        cached: int,
        counts: Counts,
        cache: Cache,
        peak: PeakMemory,
    ) -> Stats:
        ttft, prefill, decode = rates(start, run.times, prompt - cached)
        return Stats(
            model=self.loaded.name,
            method=self.method,
            trained_window=self.loaded.trained_window,
            prompt_tokens=prompt,
            cached_tokens=cached,
            new_tokens=len(run.tokens),
            ttft_s=ttft,
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
            budget=self.budget,
            attended_share=counts.attended_share,
            reuse_hit_rate=counts.reuse_hit_rate,
            kv_bytes=cached_bytes(cache),
            peak_memory_bytes=peak.read(),
            peak_memory_scope=peak.scope,
            config=None if self._settings is None else asdict(self._settings),
        )


class Conversation:
    """Several turns on one KV cache: each turn reads only what is new.

    The model stays attached to the method until the conversation is closed.

    Args:
        llm: who answers.
        system: a first message for the model; None: what its chat template says.

    Attributes:
        messages: the conversation so far.
    """

    def __init__(self, llm: LLM, system: str | None = None) -> None:
        self.llm = llm
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._context = llm._new_context()
        self._open = ExitStack()
        self._open.enter_context(llm.attached())

    def stream(
        self, text: str, *, on_prefill: OnPrefill | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Generator[str]:
        """Answer the next message; as `LLM.stream`. What was written before a stop is kept."""
        asked = {"role": "user", "content": text}
        ids = self.llm.encode([*self.messages, asked])
        return self._record(asked, self.llm._start(ids, self._context, Sampling(**sampling), on_prefill))

    def generate(
        self, text: str, *, on_prefill: OnPrefill | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Answer:
        """Answer the next message; as `LLM.generate`."""
        return self.llm.collect(self.stream(text, on_prefill=on_prefill, **sampling))

    def close(self) -> None:
        """Give the model back as it was, and the memory of the cache."""
        self._open.close()
        self._context = self.llm._new_context()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _record(self, asked: dict[str, str], stream: Generator[str]) -> Generator[str]:
        pieces: list[str] = []
        finished = False
        try:
            with closing(stream):
                for piece in stream:
                    pieces.append(piece)
                    yield piece
            finished = True
        finally:
            if finished or pieces:
                self.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]


def _shared_prefix(cached: list[int], ids: list[int]) -> int:
    """Tokens at the start of both; one of `ids` is always left to read, for the next token comes from it."""
    limit = min(len(cached), len(ids) - 1)
    return next((i for i in range(limit) if cached[i] != ids[i]), limit)
