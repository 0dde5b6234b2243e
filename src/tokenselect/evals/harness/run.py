"""One evaluation: what was asked for, run through lm-eval, in a folder that tells it all and can be continued."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenselect.config import TokenSelectConfig
from tokenselect.evals.answering import Answerer, split_method
from tokenselect.evals.cells import Cell, Name, cells_of, metrics
from tokenselect.evals.harness.tasks import load_tasks
from tokenselect.evals.predictions import Prediction, read, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

    from tokenselect.models import LoadedModel

_SERVED = "server"  # as a method: what the server runs is its own matter


@dataclass(frozen=True, slots=True)
class Request:
    """What is evaluated.

    Attributes:
        tasks, methods: names.
        lengths: most tokens of a generated prompt.
        limit: samples of each task and length.
        output: the run's folder.
        config: settings of the selection.
        data: folder or hub name of data sets.
        chat: put prompts into the model's chat template.
    """

    tasks: Sequence[str]
    methods: Sequence[str]
    lengths: Sequence[int]
    limit: int
    output: Path
    config: TokenSelectConfig
    data: str | None = None
    chat: bool = False

    @property
    def predictions(self) -> Path:
        """The file with all answers."""
        return self.output / "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class Server:
    """A server with OpenAI's completions API.

    Attributes:
        url: of its API, such as http://localhost:8000/v1.
        model: the name that it knows the model by.
        tokenizer: folder or hub name; counts the tokens of prompts.
    """

    url: str
    model: str
    tokenizer: str


def prepare(request: Request, resume: bool, facts: dict[str, Any]) -> None:
    """Make the run's folder and write config.json.

    Args:
        request: what is evaluated.
        resume: whether the folder may hold answers already.
        facts: what else tells this run from others: the model above all.

    Raises:
        ValueError: the folder holds answers and is not to be resumed, or they are of another model.
    """
    file = request.output / "config.json"
    if request.predictions.exists():
        if not resume:
            raise ValueError(f"{request.output} holds answers already: pass --resume, or another --output")
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else facts
        for name in ("model", "chat"):
            if before.get(name) != {**facts, "chat": request.chat}[name] and name in before:
                raise ValueError(f"{request.output} was begun with another {name}: {before[name]}")
    request.output.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(request, name) for name in ("tasks", "methods", "lengths", "limit", "data", "chat")}
    content = {**asked, **facts, "settings": asdict(request.config), "versions": _versions()}
    file.write_text(json.dumps(content, indent=2, default=list) + "\n", encoding="utf-8")


def run_in_process(
    request: Request, loaded: LoadedModel, tokenizer: str, on_answer: Callable[[Prediction], None]
) -> None:
    """Every method after the other, in this process.

    Args:
        request: what is evaluated.
        loaded: the model.
        tokenizer: where its tokenizer lies.
        on_answer: called with each answer.
    """
    from tokenselect.evals.harness.models import InProcess

    tasks = load_tasks(request.tasks, tokenizer, request.lengths, request.limit, request.data)
    for method in request.methods:
        settings = "" if split_method(method)[0] == "dense" else settings_of(request.config)
        with Answerer(loaded, method, request.config) as answerer:
            model = InProcess(answerer, request.chat)
            _evaluate(request, model, tasks, method, settings, str(loaded.model.device), on_answer)


def run_on_server(request: Request, server: Server, on_answer: Callable[[Prediction], None]) -> None:
    """The same against a running server, by lm-eval's own client."""
    from lm_eval.api.registry import get_model

    tasks = load_tasks(request.tasks, server.tokenizer, request.lengths, request.limit, request.data)
    client = get_model("local-completions").create_from_arg_obj(
        {
            "base_url": f"{server.url.rstrip('/')}/completions",
            "model": server.model,
            "tokenizer": server.tokenizer,
            "tokenized_requests": False,
            "max_length": 2**31 - 1,
        }
    )
    _evaluate(request, client, tasks, _SERVED, "", server.url, on_answer)


def _evaluate(
    request: Request,
    model: LM,
    tasks: dict[str, Task],
    method: str,
    settings: str,
    device: str,
    on_answer: Callable[[Prediction], None],
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tokenselect.evals.harness.models import Recorded

    recorded = Recorded(model, tasks, request.predictions, method, settings, device, on_answer)
    # Generated tasks have as many questions as were asked for; the limit is for those with data.
    limit = request.limit * len(request.lengths)
    with _quiet():
        simple_evaluate(
            recorded,
            tasks=list(tasks.values()),
            task_manager=TaskManager(include_defaults=False),  # its own tasks take twenty seconds to list
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=request.chat,
        )


def finish(request: Request) -> dict[Name, Cell]:
    """Write metrics.json and return the cells that were asked for."""
    found = {
        name: cell
        for name, cell in cells_of(read(request.predictions)).items()
        if name.task in request.tasks and (name.length == 0 or name.length in request.lengths)
    }
    text = json.dumps(metrics(found), indent=2) + "\n"
    (request.output / "metrics.json").write_text(text, encoding="utf-8")
    return found


def _versions() -> dict[str, str]:
    names = ("tokenselect", "torch", "transformers", "lm_eval", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs every step and draws bars: our progress tells more."""
    from lm_eval.api import task

    log = logging.getLogger("lm_eval")
    before, bars = log.level, task.tqdm
    log.setLevel(logging.ERROR)
    task.tqdm = partial(bars, disable=True)
    try:
        yield
    finally:
        log.setLevel(before)
        task.tqdm = bars
