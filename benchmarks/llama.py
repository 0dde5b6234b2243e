"""llama.cpp as a process of its own, from our side of the pipe; `make llama` installs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.llama_gguf import gguf_file
from tokenselect.measure import Run

_ROOT = Path(__file__).parents[1]
PYTHON = _ROOT / ".venv-llama" / "bin" / "python"


class Llama:
    """One set of weights, loaded.

    Args:
        weights: "bf16" or "q8_0", made from the weights that Transformers runs.
        num_tokens: the most that its cache will hold.
        threads: CPU threads.

    Attributes:
        version: of llama-cpp-python, and the instruction sets that its llama.cpp uses.
    """

    def __init__(self, weights: str, num_tokens: int, threads: int) -> None:
        if not PYTHON.exists():
            raise FileNotFoundError(f"llama.cpp is not installed in {PYTHON.parents[1]}: run `make llama`")
        path = gguf_file(weights)
        command = [str(PYTHON), str(_ROOT / "benchmarks" / "llama_cpp.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts = self._ask(do="load", path=str(path), n_ctx=-(-num_tokens // 256) * 256, threads=threads)
        self.version = f"llama-cpp-python {facts['version']} ({' '.join(facts['system'].split())})"

    def fill(self, ids: list[int]) -> None:
        """Let the cache hold so many tokens, cheaply: read in pieces that do not see each other."""
        self._ask(do="fill", ids=ids)

    def read_and_write(self, ids: list[int], num_steps: int, past: int = 0) -> Run:
        """As `measure.read_and_write`, after the first `past` tokens of what the cache holds."""
        self._ask(do="cut", length=past)
        read = self._ask(do="read", ids=ids)
        written = self._ask(do="write", steps=num_steps)
        return Run(read["seconds"], written["seconds"], [read["token"], *written["tokens"]])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"llama.cpp ended with code {self._process.wait()}; its last words are above")
        result: dict[str, Any] = json.loads(answer)
        return result
