"""`tokenselect inspect`: a page, a text or JSON; a trace is kept and shown again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import SMALL, Done, Shell, sentence
from tiny import LONG, save_tiny

from tokenselect.trace import load_trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capfd, folder)


def ask(shell: Shell, *args: str | Path) -> Done:
    asked = ("--max-new-tokens", "6", "-p", "w5", *args)
    return shell("inspect", "--model", shell.model, *SMALL, *asked, stdin=LONG.encode())


def test_a_page(shell: Shell, tmp_path: Path) -> None:
    done = ask(shell, "--find", "w36 w49")
    assert (done.code, done.out) == (0, "inspect.html\n")
    assert (tmp_path / "inspect.html").read_text().startswith("<!doctype html>")
    assert "read 123 tokens" in done.err


def test_json_and_text_agree(shell: Shell) -> None:
    found = json.loads(ask(shell, "--json").out)
    assert len(found["passages"]) == 2  # words without sentences are cut every 96 tokens
    assert len(json.loads(ask(shell, "--json", "--passages", "1").out)["passages"]) == 1
    assert len(found["layers"]) == 2
    assert found["answer_tokens"] == 6
    lines = ask(shell, "--text", "--quiet")
    assert lines.err == ""
    assert f"tokens {found['passages'][0]['start']} to" in lines.out


def test_a_trace_is_shown_again(shell: Shell, tmp_path: Path) -> None:
    first = ask(shell, "--save", "kept.npz", "--json")
    assert load_trace("kept.npz").num_steps == 6
    assert shell("inspect", "--trace", "kept.npz", "--json").out == first.out
    assert shell("inspect", "--trace", "kept.npz", "-o", "again.html").code == 0
    assert (tmp_path / "again.html").exists()


def test_mistakes(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no trace")
    assert "is not a trace" in sentence(shell("inspect", "--trace", "text.npz"))
    assert "leave --prompt and --file out" in sentence(shell("inspect", "--trace", "text.npz", "-p", "w1"))
    assert "--passages must be >= 1" in sentence(shell("inspect", "--passages", "0"))
    assert "No such file" in sentence(shell("inspect", "--trace", "nothing.npz"))
