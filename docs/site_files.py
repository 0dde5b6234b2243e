"""Hook of the documentation site: figures and numbers of `benchmarks/results` lie where the pages link to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).parents[1]
_RESULTS = "benchmarks/results"


def on_files(files: Any, config: Any) -> Any:
    """Add the results to the site."""
    for path in sorted((_ROOT / _RESULTS).glob("*.*")):
        name = path.relative_to(_ROOT).as_posix()
        files.append(File(name, str(_ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ into the results lead to these copies; other files of the repository have none."""
    for path in ("docs/", "../"):
        markdown = markdown.replace(f"]({path}", "](")
    return re.sub(rf"\[([^\]]+)\]\({_RESULTS}/?\)", r"\1", markdown)  # a folder is no page
