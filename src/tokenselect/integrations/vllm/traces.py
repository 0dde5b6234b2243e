"""What single requests selected, kept in files where the server allows it: `tokenselect inspect --trace FILE`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from tokenselect.integrations.vllm.settings import trained_window
from tokenselect.trace.answers import trace_answer
from tokenselect.trace.files import save_trace
from tokenselect.trace.recorder import Recorder

if TYPE_CHECKING:
    from tokenselect.config import TokenSelectConfig

_log = init_logger("vllm.tokenselect")


@dataclass(slots=True)
class RequestTrace:
    """One request that is traced.

    Attributes:
        recorder: what it selects from the last token of its prompt on.
        prompt: its tokens, and
        written: those that it wrote; vLLM's own lists, which grow.
    """

    recorder: Recorder
    prompt: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    def follow(self, request: Any) -> None:
        """Look at a request anew: vLLM replaces its lists when it was preempted."""
        self.prompt, self.written = request.prompt_token_ids, request.output_token_ids


class TraceFolder:
    """The folder that the server allows traces in.

    Args:
        folder: made if it does not exist.
        vllm_config: the engine's.
    """

    def __init__(self, folder: Path, vllm_config: Any) -> None:
        self.folder, self._config = folder, vllm_config
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, request: Any) -> RequestTrace:
        """A recorder for a new request."""
        recorder = Recorder(trained_window(self._config))
        recorder.begin(request.num_prompt_tokens - 1)
        return RequestTrace(recorder)

    def keep(self, name: str, config: TokenSelectConfig, trace: RequestTrace) -> None:
        """Write the trace of a request that ended to a file of its name; a failure is logged and ends nothing."""
        file = self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.npz"
        model = str(self._config.model_config.model)
        try:
            made = trace_answer(trace.recorder, self._tokenizer, model, config, trace.prompt, trace.written)
            growing = file.with_suffix(".part")  # who waits for the file never reads half of it
            save_trace(made, growing)
            growing.replace(file)
        except Exception as error:  # the engine serves others
            _log.warning("TokenSelect: the trace of request %s was not kept: %s", name, error)
        else:
            _log.info("TokenSelect: the trace of request %s is in %s", name, file)

    @cached_property
    def _tokenizer(self) -> Any:
        return cached_tokenizer_from_config(self._config.model_config)
