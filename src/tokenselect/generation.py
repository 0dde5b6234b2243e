"""One run of `model.generate`, in a thread of its own, so that its text can be read while it is written."""

from __future__ import annotations

import time
from contextlib import contextmanager
from queue import Empty
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteriaList, TextIteratorStreamer

from tokenselect.embedded import quiet_transformers
from tokenselect.integrations.cache_name import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenselect.models import LoadedModel
    from tokenselect.sampling import Sampling


class _Stopped(BaseException):
    """Ends the reading of a prompt from inside the model; no `except Exception` on the way may keep it."""


class _Recorder(TextIteratorStreamer):  # type: ignore[misc]
    """Text for the reader, and when which token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
            self.times.append(time.perf_counter())
        super().put(value)


class Generation:
    """Generates from token ids; what it wrote and when is in its attributes, also while it runs.

    Args:
        loaded: the model and its tokenizer.
        ids: all tokens of the prompt, those that `cache` holds already included.
        cache: keys and values of the first tokens; grows.
        sampling: how to choose tokens and when to stop.
        on_prefill: called with (tokens read, tokens to read), in the thread that generates.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ids: list[int],
        cache: Cache,
        sampling: Sampling,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self._loaded, self._ids, self._cache, self._sampling = loaded, ids, cache, sampling
        self._on_prefill = on_prefill
        self._recorder = _Recorder(loaded.tokenizer)
        self._stop, self._ended = Event(), Event()
        self._ended.set()
        self._error: BaseException | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens written so far."""
        return self._recorder.tokens

    @property
    def times(self) -> list[float]:
        """When each of them came, by `time.perf_counter`."""
        return self._recorder.times

    def pieces(self) -> Iterator[str]:
        """Start, and give the text in pieces as they are decoded.

        Ctrl-C stops the run at the next token or, in prefill, at the next chunk; the rest of the text comes
        and then `KeyboardInterrupt` goes on its way. Closing this iterator stops the run, too.

        Raises:
            Exception: whatever `generate` raised.
        """
        try:
            self._start()
            yield from filter(None, self._recorder)
        except KeyboardInterrupt:
            self.stop()
            yield from filter(None, self._left_over())
            raise
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the run and wait until it has ended."""
        self._stop.set()
        self._ended.wait()

    def report(self, done: int, total: int) -> None:
        """To be called by the method while the prompt is read."""
        if self._stop.is_set():
            raise _Stopped
        if self._on_prefill is not None:
            self._on_prefill(done, total)

    def _start(self) -> None:
        # Ctrl-C may come while the thread starts, when it cannot be joined yet: hence an event.
        self._ended.clear()
        try:
            Thread(target=self._run, name="tokenselect-generation", daemon=True).start()
        except RuntimeError:  # there can be no more threads
            self._ended.set()
            raise

    def _left_over(self) -> Iterator[str | None]:
        try:
            while True:
                yield self._recorder.text_queue.get_nowait()
        except Empty:
            return

    def _run(self) -> None:
        try:
            with quiet_transformers(), _seeded(self._sampling):
                self._generate()
        except _Stopped:
            pass
        except BaseException as error:  # it belongs to the reader's thread
            self._error = error
        finally:
            self._recorder.text_queue.put(None)  # ends the iteration
            self._ended.set()

    def _generate(self) -> None:
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        inputs = torch.tensor([self._ids], device=model.device)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=self._recorder,
            stopping_criteria=StoppingCriteriaList([self._stopped]),
            pad_token_id=_pad_token(model, tokenizer),
            **{CACHE: self._cache},
            **self._sampling.generate_options(),
        )

    def _stopped(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((ids.shape[0],), self._stop.is_set(), device=ids.device)


def _pad_token(model: Any, tokenizer: Any) -> int:
    """Any valid token: there is no padding in a batch of one, but Transformers wants to know."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    """The caller's random state is as before, if a seed was given."""
    if sampling.seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        yield
