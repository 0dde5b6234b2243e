"""One model over several processes: `tokenselect serve` writes the same tokens however it is cut.

Tensor and pipeline parallelism, two replicas, and two "nodes", which find each other over the loopback.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.vllm.engines import SETTINGS, prompt, save_model
from tests.vllm.servers import started, wait_until_healthy

PROMPTS = [prompt(length, length, 49_152) for length in (5, 70, 300, 1000, 4097)]
TOKENS = 12
ONE_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the embedded model's tokenizer."""
    from tokenselect.embedded import embedded_model_path

    folder = save_model(tmp_path_factory.mktemp("model"), vocab_size=49_152)
    for file in embedded_model_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one process writes."""
    with server(model, tmp_path_factory.mktemp("one")) as port:
        written = answers(port)
    assert len({tuple(answer) for answer in written}) == len(written)
    return written


@pytest.mark.parametrize(
    "flags",
    [
        ["--tensor-parallel-size", "2"],
        # vLLM's later stages get the memory for what earlier ones send in a warm-up that they leave out if eager.
        ["--pipeline-parallel-size", "2", "--no-enforce-eager"],
        ["--data-parallel-size", "2"],
    ],
    ids=["tensor parallel", "pipeline parallel", "data parallel"],
)
def test_processes_write_what_one_writes(model: Path, alone: list[list[int]], tmp_path: Path, flags: list[str]) -> None:
    with server(model, tmp_path, *flags, **ONE_CORE_EACH) as port:
        assert answers(port) == alone


def test_two_nodes_write_what_one_writes(model: Path, alone: list[list[int]], tmp_path: Path) -> None:
    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    meeting += ["--tensor-parallel-size", "2"]
    with ExitStack() as stack:
        follower = [*meeting, "--node-rank", "1", "--headless"]
        stack.enter_context(serving(model, tmp_path / "follower", *follower, VLLM_CPU_OMP_THREADS_BIND="1"))
        leader = [*meeting, "--node-rank", "0"]
        port = stack.enter_context(server(model, tmp_path / "leader", *leader, VLLM_CPU_OMP_THREADS_BIND="0"))
        assert answers(port) == alone


@contextmanager
def server(model: Path, folder: Path, *flags: str, **environment: str) -> Iterator[int]:
    """A server that answers, and its port."""
    port = free_port()
    with serving(model, folder, *flags, "--port", str(port), **environment) as process:
        wait_until_healthy(process, port, folder / "log")
        yield port


def serving(
    model: Path, folder: Path, *flags: str, **environment: str
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A process that serves the model."""
    folder.mkdir(exist_ok=True)
    given = [str(model), "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192", "--max-num-seqs", "8"]
    given += ["--block-size", "32", "--tokenselect", json.dumps(SETTINGS), *flags]
    return started(folder / "log", *given, **environment)


def answers(port: int) -> list[list[int]]:
    """What is written after each prompt, all given at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda ids: _complete(port, ids), PROMPTS))


def _complete(port: int, ids: list[int]) -> list[int]:
    body = {"prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        written: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return written


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
