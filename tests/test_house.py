"""The house rules that a reader relies on: layers, and documentation that is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tokenselect"

# What each part may import, from the top down.
LAYERS = [
    {"__main__"},
    {"cli", "demo"},
    {"llm", "generation", "sampling"},
    {"methods", "evals", "models", "embedded", "measure", "memory", "stats", "inspect"},
    {"integrations"},
    {"cache", "offload", "trace"},
    {"selection"},
    {"distances"},
    {"rotary", "config", "hardware"},
    {"ops"},
]


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            base = [node.module] if node.module != "tokenselect" else [f"tokenselect.{a.name}" for a in node.names]
            names.update(base)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("tokenselect.")}


def _level(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_is_below_it(path: Path) -> None:
    own = _part(path)
    upwards = {other for other in _imports(path) - {own, "__version__"} if _level(other) < _level(own)}
    assert not upwards, f"{own} imports {upwards} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_the_tree_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :]
    parts = {_part(path) for path in FILES}
    missing = {part for part in parts if not re.search(rf"\b{part}(\.py|/)", tree)}
    assert not missing


def test_the_code_in_the_readme_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenselect.embedded import embedded_model_path

    document = "The harbour master of Riga is called Anna. " * 30
    names = {"name": str(embedded_model_path()), "document": document, "question": "The harbour master is called"}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), dict(names))
        assert "Anna" in capsys.readouterr().out
