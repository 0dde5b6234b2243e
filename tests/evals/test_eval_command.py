"""`tokenselect eval` from end to end: a tiny model, lm-eval, a folder to go on with, data of the known formats."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from tokenselect import cli
from tokenselect.evals.harness import models, run
from tokenselect.evals.harness.tasks import GENERATED, load_tasks
from tokenselect.evals.predictions import read
from tokenselect.evals.tasks import TASKS
from tokenselect.models import embedded_model_path

SMALL = (
    *("--num-sink-tokens", "4", "--num-local-tokens", "16", "--num-selected-tokens", "16", "--block-size", "16"),
    *("--num-tail-tokens", "4", "--num-dense-tokens", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tokenselect", "eval", *map(str, args)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), *capfd.readouterr()


def test_a_run_that_was_killed_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", folder, "--tasks", "passkey,facts_qa", "--method", "tokenselect,dense", "--context", "150,200")
    args = (*args, "--limit", "2", *SMALL, "--output", tmp_path / "run")
    with monkeypatch.context() as patch:
        asked: list[str] = []
        original = models.InProcess._answer

        def dies(self: models.InProcess, request: Any) -> str:
            if len(asked) == 5:
                raise KeyboardInterrupt
            asked.append(request.task_name)
            return original(self, request)

        patch.setattr(models.InProcess, "_answer", dies)
        code, _, _ = call(patch, capfd, *args)
    assert code == 130
    file = tmp_path / "run" / "predictions.jsonl"
    before = read(file)
    assert len(before) == 5
    code, _, err = call(monkeypatch, capfd, *args)
    assert (code, err) == (2, f"Error: {tmp_path / 'run'} holds answers already: pass --resume, or another --output\n")
    code, out, _ = call(monkeypatch, capfd, *args, "--resume", "--json")
    assert code == 0
    predictions = read(file)
    assert predictions[:5] == before
    assert len({one.key for one in predictions}) == len(predictions) == 16
    cells = json.loads(out)["cells"]
    assert {(cell["task"], cell["length"], cell["n"]) for cell in cells} == {
        (task, length, 2) for task in ("passkey", "facts_qa") for length in (150, 200)
    }
    ours = [cell for cell in cells if cell["method"] == "tokenselect"]
    assert all(cell["against_dense"]["p"] <= 1 and cell["settings"].startswith("num_sink_tokens=4") for cell in ours)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.json", "passkey_by_depth.png", "score_by_length.png"} <= names
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"] == str(folder)
    assert config["versions"]["lm_eval"]


def test_a_table_is_the_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", folder, "--context", "150", "--limit", "1", *SMALL, "--output", tmp_path / "run", "--quiet")
    code, out, err = call(monkeypatch, capfd, *args)
    assert (code, err) == (0, "")
    assert "passkey" in out
    assert "0%-79%" in out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--tasks", "passky"), "there is no task 'passky'; generated are passkey"),
        (("--tasks", "passkey,,x"), "--tasks must be names or numbers separated by commas, got 'passkey,,x'"),
        (("--method", "sparse"), "--method must be one of tokenselect"),
        (("--method", "dense+forced"), "only tokenselect has options, got 'dense+forced'"),
        (("--context", "4K"), "--context must be whole numbers between 1 and 2147483647, got '4K'"),
        (("--limit", "0"), "--limit must be between 1 and 2147483647, got 0"),
        (("--server", "http://localhost:1"), "--server needs --served-model"),
        (("--context", "20"), "a prompt of 20 tokens leaves no room"),
    ],
)
def test_nonsense_is_told_in_one_sentence(
    args: tuple[str, ...],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, out, err = call(monkeypatch, capfd, "--model", folder, "--output", tmp_path / "run", "--quiet", *SMALL, *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {sentence}")
    assert err.count("\n") == 1


def test_tasks_are_listed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capfd, "--tasks", "list")
    assert code == 0
    assert all(f"{name} " in out for name in TASKS)
    assert "longbench_*" in out


def test_every_generated_task_is_one_of_lm_evals() -> None:
    assert {file.stem for file in GENERATED.glob("[a-z]*.yaml")} == set(TASKS)
    names = [name for name in TASKS if name != "fact_novel"]
    tasks = load_tasks(names, str(embedded_model_path()), [2000], 1, None)
    assert list(tasks) == names
    for name, task in tasks.items():
        (doc,) = task.test_docs()
        assert task.doc_to_text(doc) == doc["prompt"]
        assert task.config.generation_kwargs["max_gen_toks"] == doc["new_tokens"], name
        assert task.process_results(doc, [", ".join(doc["answers"])]) == {"score": 1.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files in the formats of LongBench and InfiniteBench."""
    long = {
        "question": "Who?",
        "input": "Who?",
        "context": "w1 w2 w3",
        "answers": ["w5"],
        "length": 3,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    infinite = {"id": 0, "context": "w1 w2 w3", "input": "What is the key?", "answer": ["12345"], "options": []}
    for name, rows in {
        "qasper": [long, long],
        "qasper_e": [long],
        "passkey": [infinite, {**infinite, "id": 1}],
        "longbook_qa_eng": [{**infinite, "answer": ["w5 w6"]}],
        "longbook_choice_eng": [{**infinite, "answer": ["w1"], "options": ["w1", "w2", "w3", "w4"]}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_data_are_read_from_a_folder(
    data: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = (
        "longbench_qasper,longbench_qasper_e,infinitebench_passkey,infinitebench_longbook_qa_en,"
        "infinitebench_longbook_choice_en"
    )
    args = ("--model", folder, "--tasks", names, "--data", data, "--limit", "2", "--context", "150", *SMALL)
    code, out, _ = call(monkeypatch, capfd, *args, "--output", tmp_path / "run", "--json", "--quiet")
    assert code == 0
    assert {cell["task"]: cell["n"] for cell in json.loads(out)["cells"]} == {
        "longbench_qasper": 2,
        "longbench_qasper_e": 1,
        "infinitebench_passkey": 2,
        "infinitebench_longbook_qa_en": 1,
        "infinitebench_longbook_choice_en": 1,
    }
    found = {one.task: one.answers for one in read(tmp_path / "run" / "predictions.jsonl")}
    assert found["infinitebench_passkey"] == ("12345",)


def test_missing_data_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", folder, "--tasks", "longbench_gov_report", "--data", tmp_path, *SMALL, "--quiet")
    code, _, err = call(monkeypatch, capfd, *args, "--output", tmp_path / "run")
    assert code == 2
    assert f"there is no gov_report.jsonl in {tmp_path}" in err
    assert "--data" in err


class _Completions(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that copies the first number it was told in the prompt."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        number = [next(word for word in prompt.split() if word[:5].isdigit())[:5] for prompt in prompts]
        choices = [{"index": i, "text": f" {text}.", "finish_reason": "length"} for i, text in enumerate(number)]
        content = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    _Completions.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Completions) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/v1"
        found.shutdown()
        thread.join()


def test_a_running_server_is_asked(
    server: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", folder, "--server", server, "--served-model", "some/model", "--context", "150", "--limit", "2")
    code, out, _ = call(monkeypatch, capfd, *args, "--output", tmp_path / "run", "--json", "--quiet")
    assert code == 0
    (cell,) = json.loads(out)["cells"]
    assert (cell["method"], cell["n"], cell["score"]) == ("server", 2, 1.0)
    assert {body["model"] for body in _Completions.asked} == {"some/model"}
    assert {body["max_tokens"] for body in _Completions.asked} == {8}


def test_a_folder_of_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    request = run.Request(["passkey"], ["dense"], [150], 1, tmp_path, run.TokenSelectConfig())
    run.prepare(request, False, {"model": "one"})
    request.predictions.write_text("")
    run.prepare(request, True, {"model": "one"})
    with pytest.raises(ValueError, match="was begun with another model: one"):
        run.prepare(request, True, {"model": "two"})
