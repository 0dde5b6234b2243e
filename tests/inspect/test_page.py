"""The page carries all it needs and nothing that could run or be fetched beside its own script."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import made_trace

from tokenselect.inspect import page, write_page
from tokenselect.inspect.page import make_page
from tokenselect.trace import Trace

HOSTILE = "</script><script>alert(1)</script><!-- ]]> & <img src=x onerror=alert(2)> \u2028 \U0001f600 {{facts}} \\1"


class _Elements(HTMLParser):
    """Start tags with their attributes, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.contents.append(data)

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def _hostile() -> Trace:
    text = " ".join([HOSTILE.replace(" ", "_")] * 103)
    return made_trace(text, facts={**made_trace().facts, "model": HOSTILE})


def test_the_policy_allows_this_script_and_style_alone() -> None:
    text = make_page(_hostile())
    elements = _Elements(text)
    (policy,) = [str(meta["content"]) for meta in elements.of("meta") if "http-equiv" in meta]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for name, pattern in (
        ("script-src", r'<script type="module">(.*?)</script>'),
        ("style-src", "<style>(.*?)</style>"),
    ):
        content = re.search(pattern, text, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


def test_no_text_of_the_document_becomes_markup() -> None:
    plain, hostile = _Elements(make_page(made_trace())), _Elements(make_page(_hostile()))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert len(hostile.of("script")) == 3
    for _, attributes in hostile.tags:
        assert not {name for name in attributes if name.startswith("on")} | ({"src", "href", "style"} & set(attributes))


def test_nothing_is_fetched() -> None:
    own = "".join(page._asset(name) for name in (*page._SCRIPTS[1:], "style.css", "page.html"))
    assert not re.findall(r"https?:|//cdn|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|insertAdjacent|\beval\b", own)


def _arrays(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = re.search(r'id="facts">(.*?)</script>', text, re.DOTALL)
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert facts is not None
    assert data is not None
    found, block = json.loads(facts[1]), gzip.decompress(base64.b64decode(data[1]))
    arrays = {}
    for entry in found["arrays"]:
        arrays[entry["name"]] = np.frombuffer(block, entry["type"], entry["length"], entry["offset"])
    return found, arrays


def test_the_data_is_the_trace() -> None:
    trace = made_trace()
    facts, arrays = _arrays(make_page(trace))
    assert bytes(arrays["text"]).decode() == trace.text
    assert facts["numSteps"] == 3
    assert facts["facts"]["model"] == "made"
    for name, values in {"indices": trace.indices, "startLoc": trace.start_loc, "votes": trace.votes}.items():
        assert np.array_equal(arrays[name], values)
    assert arrays["headShares"].shape == (trace.head_shares.size,)


def test_positions_are_those_of_javascript() -> None:
    trace = made_trace(" ".join(["\U0001f600a"] * 103))
    _, arrays = _arrays(make_page(trace))
    units = trace.text.encode("utf-16-le")
    starts = [*arrays["starts"].tolist(), len(units) // 2]
    pieces = [units[2 * a : 2 * b].decode("utf-16-le") for a, b in pairwise(starts)]
    assert pieces == [trace.text_of(i, i + 1) for i in range(trace.num_tokens)]


def test_find() -> None:
    facts, _ = _arrays(make_page(made_trace(), "word30 word31"))
    assert facts["marked"] == [30, 32]
    for text in ("nowhere", ""):
        with pytest.raises(ValueError, match="--find"):
            make_page(made_trace(), text)


def test_it_is_written_as_it_is(tmp_path: Path) -> None:
    write_page(_hostile(), tmp_path / "a.html")
    assert (tmp_path / "a.html").read_bytes().decode() == make_page(_hostile())


def test_the_library_is_the_published_one() -> None:
    folder = Path(page.__file__).parent / "assets" / "vendor"
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert len(sums) == 3
    for digest, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
