"""Models behind lm-eval's interface: one that runs in process with a method, and a record of whatever is asked."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from lm_eval.api.model import LM

from tokenselect.evals.predictions import Key, Prediction, append, read
from tokenselect.evals.question import Question

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from tokenselect.evals.answering import Answerer

_FIELDS = [item.name for item in fields(Question)]


class _Generates(LM):  # type: ignore[misc]
    """A model for tasks that let it write."""

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused."""
        raise NotImplementedError("only tasks that generate text are supported, not those that compare likelihoods")

    loglikelihood_rolling = loglikelihood


class InProcess(_Generates):
    """A model with a method; prompts are read one by one, and what two of them share is read once.

    Args:
        answerer: entered already.
        chat: whether lm-eval puts prompts into the model's chat template.
    """

    def __init__(self, answerer: Answerer, chat: bool = False) -> None:
        super().__init__()
        self.answerer, self.chat = answerer, chat

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in lm-eval's own caches."""
        return str(self.answerer.loaded.name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as the model was trained to read them."""
        tokenizer = self.answerer.loaded.tokenizer
        return str(
            tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Instance) -> str:
        prompt, options = request.args
        if set(_FIELDS) <= set(request.doc):
            question = Question(**{**{name: request.doc[name] for name in _FIELDS}, "prompt": prompt})
            text = self.answerer.answer(question, special_tokens=not self.chat)
        else:
            text = self.answerer.complete(prompt, options.get("max_gen_toks", 256), special_tokens=not self.chat)
        for stop in options.get("until") or ():
            text = text.partition(stop)[0] if stop else text
        return text


class Recorded(_Generates):
    """Keeps every answer of a model on disk as it comes, and asks nothing twice.

    Args:
        inner: the model.
        tasks: by the name under which answers are kept.
        path: of the predictions.
        method, settings, device: who answers, see `Prediction`.
        on_answer: called with each answer, also with those that were there already.
    """

    def __init__(
        self,
        inner: LM,
        tasks: Mapping[str, Task],
        path: Path,
        method: str,
        settings: str,
        device: str,
        on_answer: Callable[[Prediction], None],
    ) -> None:
        super().__init__()
        self.inner, self.path, self.on_answer = inner, path, on_answer
        self.method, self.settings, self.place = method, settings, device
        self.tasks = {task.task_name: (name, task) for name, task in tasks.items()}

    @property
    def tokenizer_name(self) -> str:
        """That of the model."""
        return str(self.inner.tokenizer_name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        """That of the model."""
        return self.inner.apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The model's answers, or those that are on disk."""
        known = {one.key: one for one in read(self.path)}
        answers = []
        for request in requests:
            key = self._key(request)
            if key not in known:
                known[key] = self._ask(key, request)
                append(self.path, known[key])
            self.on_answer(known[key])
            answers.append(known[key].text)
        return answers

    def _key(self, request: Instance) -> Key:
        name, _ = self.tasks[request.task_name]
        doc = request.doc
        number = doc["number"] if _is_ours(doc) else request.doc_id
        return Key(name, doc["length"] if _is_ours(doc) else 0, self.method, self.settings, int(number or 0))

    def _ask(self, key: Key, request: Instance) -> Prediction:
        start = time.perf_counter()
        (text,) = self.inner.generate_until([request], disable_tqdm=True)
        seconds = round(time.perf_counter() - start, 3)
        doc, task = request.doc, self.tasks[request.task_name][1]
        scores = task.process_results(doc, [text])
        target = doc["answers"] if _is_ours(doc) else task.doc_to_target(doc)
        return Prediction(
            *key,
            depth=doc.get("depth") if _is_ours(doc) else None,
            wording=doc.get("wording", "") if _is_ours(doc) else "",
            answers=tuple(map(str, target if isinstance(target, list | tuple) else [target])),
            text=text,
            score=round(float(next(iter(scores.values()))), 4),
            seconds=seconds,
            device=self.place,
        )


def _is_ours(doc: Mapping[str, Any]) -> bool:
    """Whether a document is a question of ours."""
    return "number" in doc and "rule" in doc
