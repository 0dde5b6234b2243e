"""One self-contained HTML page from a trace: no network, no script but its own, text only ever inserted as text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenselect.inspect.report import why_nothing
from tokenselect.trace import Trace
from tokenselect.trace.passages import passage_bounds

_SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "js/data.js",
    "js/heat.js",
    "js/colours.js",
    "js/document.js",
    "js/minimap.js",
    "js/why.js",
    "js/charts.js",
    "js/controls.js",
    "js/main.js",
)
_STYLES = ("vendor/uPlot.min.css", "style.css")


def write_page(trace: Trace, file: Path, find: str | None = None) -> None:
    """Write the page that shows a trace.

    Args:
        trace: what was recorded.
        file: where; written anew.
        find: a text of the prompt to mark and to begin with.

    Raises:
        ValueError: `find` is not in the text.
        OSError: the file cannot be written.
    """
    file.write_text(make_page(trace, find), encoding="utf-8", newline="\n")


def make_page(trace: Trace, find: str | None = None) -> str:
    """The page as text; see `write_page`."""
    arrays, packed = _pack(_arrays(trace))
    facts = {**_facts(trace), "marked": _find(trace, find), "arrays": arrays}
    script, style = _joined(_SCRIPTS), _joined(_STYLES)
    parts = {
        "policy": _policy(script, style),
        "style": style,
        "script": script,
        "facts": _in_html(json.dumps(facts)),
        "data": packed,
    }
    template = _asset("page.html")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _asset(name: str) -> str:
    return files("tokenselect.inspect").joinpath("assets", *name.split("/")).read_text(encoding="utf-8")


def _joined(names: tuple[str, ...]) -> str:
    """Files as one, as the browser will read them: with plain newlines."""
    return "\n".join(_asset(name).replace("\r\n", "\n") for name in names)


def _policy(script: str, style: str) -> str:
    """Nothing but this very script and style, and no request whatever."""
    own = {"script-src": script, "style-src": style}
    rules = [f"{name} '{_hash(content)}'" for name, content in own.items()]
    return "; ".join(["default-src 'none'", *rules, "base-uri 'none'", "form-action 'none'"])


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _in_html(text: str) -> str:
    """JSON that can end no element and begin no comment."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _facts(trace: Trace) -> dict[str, Any]:
    return {
        "facts": dict(trace.facts),
        "numTokens": trace.num_tokens,
        "numPrompt": trace.num_prompt_tokens,
        "numSteps": trace.num_steps,
        "numHeads": trace.head_shares.shape[1],
        "numSinks": trace.num_sinks,
        "nothing": None if len(trace.indices) else why_nothing(trace),
    }


def _find(trace: Trace, text: str | None) -> list[int] | None:
    """First token, and one past the last, of a text."""
    if text is None:
        return None
    at = trace.text.find(text) if text else -1
    if at < 0:
        raise ValueError(f"--find: the text is not in the prompt or the answer: {text!r}")
    first = int(np.searchsorted(trace.starts, at, side="right")) - 1
    return [first, int(np.searchsorted(trace.starts, at + len(text)))]


def _arrays(trace: Trace) -> dict[str, NDArray[Any]]:
    """What the page's script reads; numbers of JavaScript hold no 64-bit integers and no half floats."""
    return {
        "text": np.frombuffer(trace.text.encode("utf-8", "replace"), np.uint8),
        "starts": _utf16_starts(trace),
        "bounds": np.asarray(passage_bounds(trace), np.int32),
        "layers": trace.layers,
        "startLoc": trace.start_loc.astype(np.int32),
        "indices": trace.indices,
        "votes": trace.votes.astype(np.float32),
        "headShares": trace.head_shares.ravel(),
        "windows": trace.windows.ravel(),
        "served": trace.served.ravel(),
        "mass": trace.mass.ravel(),
    }


def _utf16_starts(trace: Trace) -> NDArray[np.int32]:
    """Where tokens begin as JavaScript counts, for which some characters are two."""
    signs = np.frombuffer(trace.text.encode("utf-32-le", "surrogatepass"), np.uint32)
    extra = np.concatenate([[0], np.cumsum(signs > 0xFFFF)])
    return np.asarray(trace.starts + extra[trace.starts], np.int32)


def _pack(arrays: dict[str, NDArray[Any]]) -> tuple[list[dict[str, Any]], str]:
    """Where each array lies in one block of bytes, and that block, compressed, as base64."""
    layout, blocks, offset = [], [], 0
    for name, array in arrays.items():
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        padding = -len(content) % 4
        layout.append({"name": name, "type": array.dtype.name, "offset": offset, "length": len(array)})
        blocks += [content, bytes(padding)]
        offset += len(content) + padding
    return layout, base64.b64encode(gzip.compress(b"".join(blocks), 6, mtime=0)).decode()
