"""`tokenselect serve` as a user meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.servers import started, wait_until_healthy

PORT = 8719
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps traces."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The embedded model, served."""
    flags = ["--trace-folder", str(traces), "--port", str(PORT), "--max-model-len", "33000", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log"
    with started(log, *flags) as process:
        wait_until_healthy(process, PORT, log)
        yield process


def _post(body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(f"{URL}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _complete(prompt: str, **more: Any) -> tuple[int, Any]:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
    return _post(json.dumps(body).encode())


def _metric(name: str) -> float:
    lines = urllib.request.urlopen(f"{URL}/metrics").read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_pass_key_beyond_the_window_is_found_and_counted(server: object) -> None:
    from transformers import AutoTokenizer

    from tokenselect.embedded import embedded_model_path
    from tokenselect.evals.needle import is_right, passkey, raw_prompt

    sample = passkey(AutoTokenizer.from_pretrained(embedded_model_path()), 32_000, 0.3, "pass key")
    status, answer = _complete(raw_prompt(sample))
    assert status == 200
    assert is_right(answer["choices"][0]["text"], sample)
    attended, available = (_metric(f"vllm:tokenselect_{name}_tokens_total") for name in ("attended", "available"))
    assert 0 < attended < available / 4
    assert _metric("vllm:tokenselect_selected_tokens_total") > 0


def test_a_request_may_leave_a_trace_of_what_it_read(server: object, traces: Path) -> None:
    from transformers import AutoTokenizer

    from tokenselect.embedded import embedded_model_path
    from tokenselect.evals.needle import is_right, passkey, raw_prompt
    from tokenselect.trace import find_passages, load_trace

    sample = passkey(AutoTokenizer.from_pretrained(embedded_model_path()), 9_000, 0.3, "pass key")
    answer = _complete(raw_prompt(sample))[1]["choices"][0]["text"]
    assert is_right(answer, sample)
    traced = _complete(raw_prompt(sample), vllm_xargs={"tokenselect_trace": 1})[1]
    deadline = time.monotonic() + 60
    while not (files := list(traces.glob("*.npz"))):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert traced["choices"][0]["text"] == answer
    assert len(files) == 1  # the other requests left none
    assert files[0].name.startswith(traced["id"])
    trace = load_trace(files[0])
    assert trace.answer == answer
    assert (trace.num_steps, trace.num_layers) == (8, 30)
    assert is_right(find_passages(trace, most=1)[0].text, sample)


WRONG_KNOBS = [
    {"tokenselect_k": 9999},
    {"tokenselect_k": 0},
    {"tokenselect_unknown": 1},
    {"tokenselect_trace": 2},
]


@pytest.mark.parametrize("knob", WRONG_KNOBS)
def test_wrong_knobs_are_the_clients_mistake(server: object, knob: dict[str, int]) -> None:
    status, answer = _complete("x", vllm_xargs=knob)
    assert status == 400
    assert next(iter(knob)) in answer["error"]["message"]


def test_malformed_and_overlong_requests_are_the_clients_mistake(server: object) -> None:
    assert _post(b'{"model":')[0] in (400, 422)
    assert _complete("word " * 40_000)[0] == 400


def test_a_client_that_hangs_up_frees_its_blocks(server: object) -> None:
    body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 15_000, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{URL}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        stream.readline()
        assert _metric("vllm:num_requests_running") == 1
    deadline = time.monotonic() + 60
    while _metric("vllm:num_requests_running") or _metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_server_ends_when_it_is_told_to(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) in (0, -signal.SIGTERM)
