"""Questions answered in process: a model with a method, one prompt at a time, greedily."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from tokenselect.evals.forced import ForcedBackend, force, token_positions
from tokenselect.evals.prefix import Prefix
from tokenselect.integrations.cache_name import CACHE
from tokenselect.methods import METHODS, attach

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenselect.config import TokenSelectConfig
    from tokenselect.evals.question import Question
    from tokenselect.models import LoadedModel

# These can go on from the start that two prompts share. Dense attention could: but it reads a whole prompt without a
# mask, which is faster than a part of it with one.
_KEEPS_PREFIX = ("tokenselect", "streaming")
OPTIONS = {
    "select": "selects in contexts of any length, also in those that are attended whole by default",
    "forced": "the tokens of the needles are forced into every selection: the ceiling of any selection",
}


def split_method(name: str) -> tuple[str, tuple[str, ...]]:
    """A method and its options, from "method+option".

    Raises:
        ValueError: there is no such method or option.
    """
    method, *options = name.split("+")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"the option of a method must be one of {', '.join(OPTIONS)}, got {option!r}")
        if method != "tokenselect":
            raise ValueError(f"only tokenselect has options, got {name!r}")
    return method, tuple(options)


class Answerer:
    """Context manager: inside it the model runs with a method and answers questions.

    Args:
        loaded: the model.
        method: one of `METHODS`; "tokenselect" may have options: "tokenselect+select", "tokenselect+forced" (see
            `OPTIONS`).
        config: the settings.
        on_prefill: called with (tokens read, tokens to read).

    Raises:
        ValueError: there is no such method or option, or the budget is larger than the model's window.
        NotImplementedError: the model cannot be served by the method.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: str,
        config: TokenSelectConfig,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        base, options = split_method(method)
        if "select" in options:
            config = config.replace(num_dense_tokens=0)
        self.loaded = loaded
        self._context = attach(loaded.model, base, config, on_prefill)
        self._forced: ForcedBackend | None = force(self._context) if "forced" in options else None  # type: ignore[arg-type]
        self._prefix = Prefix(loaded.model, config.block_size) if base in _KEEPS_PREFIX else None
        self._stack = ExitStack()

    def __enter__(self) -> Answerer:
        self._stack.enter_context(self._context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def answer(self, question: Question, special_tokens: bool = True) -> str:
        """What the model writes after the prompt; `special_tokens` as in `complete`.

        Raises:
            ValueError: needles are to be forced, and the question has none.
        """
        if self._forced is not None:
            self._forced.positions = torch.tensor(self._positions(question, special_tokens))
        return self.complete(question.prompt, question.new_tokens, special_tokens)

    def complete(self, prompt: str, new_tokens: int, special_tokens: bool = True) -> str:
        """A greedy completion of a text; `special_tokens`: whether the tokenizer adds its own, which a chat has."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=special_tokens, verbose=False)
        ids = encoded.input_ids
        inputs = ids.to(model.device)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id or 0,
            **{CACHE: self._cache(ids[0])},
        )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def _cache(self, ids: torch.Tensor) -> DynamicCache:
        if self._prefix is None:
            return DynamicCache(config=self.loaded.model.config)
        return self._prefix.share_with(ids)

    def _positions(self, question: Question, special_tokens: bool) -> list[int]:
        if not question.needles:
            raise ValueError("nothing can be forced into the selection: the task has no needles")
        encoded = self.loaded.tokenizer(
            question.prompt, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False
        )
        return token_positions(encoded["offset_mapping"], question.prompt, question.needles)
