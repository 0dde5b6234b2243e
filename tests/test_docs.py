"""The documentation is true: its code runs, its reference is that of the command line, its pages are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("quickstart.md", "transformers.md", "inspect.md")


def test_the_command_line_reference_is_that_of_the_command_line(tmp_path: Path) -> None:
    made = tmp_path / "cli.md"
    options = ("utils", "docs", "--name", "tokenselect", "--title", "Command line", "--output", str(made))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(
        [sys.executable, "-m", "typer", "tokenselect.cli", *options], env=environment, check=True, capture_output=True
    )
    assert made.read_text() == (ROOT / "docs" / "cli.md").read_text(), "run: make cli-reference"


@pytest.mark.parametrize("page", PAGES)
def test_the_code_in_the_docs_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenselect.embedded import embedded_model_path

    document = "The harbour master of Riga is called Anna. " * 30
    names = {"name": str(embedded_model_path()), "document": document, "question": "The harbour master is called"}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    assert "Anna" in capsys.readouterr().out


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = set(re.findall(r"^ *- (?:[^:#\n]+: )?([\w-]+\.md)$", navigation, re.MULTILINE))
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}
