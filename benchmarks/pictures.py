"""Pictures of the page that `tokenselect inspect` writes, for README and docs: docs/images/inspect*.png.

    python -m benchmarks.pictures

Needs Chromium (`apt-get install chromium`) and the extra `browser`; takes about a minute. The page itself stays in
build/inspect.html.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenselect import LLM
from tokenselect.evals import demo_samples, raw_prompt
from tokenselect.inspect import write_page
from tokenselect.trace import Trace, find_passages

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "build" / "inspect.html"
IMAGES = ROOT / "docs" / "images"
_LENGTH, _SAMPLE, _NEW_TOKENS = 12_000, 1, 10
# Name, width, height, colour scheme, whether one token written is looked at, how far the side is scrolled.
_SHOTS = (
    ("inspect", 1440, 900, "light", False, 0),
    ("inspect-why", 1440, 900, "light", True, 0),
    ("inspect-layers", 1440, 900, "dark", False, 5000),
    ("inspect-phone", 390, 844, "light", False, 0),
)
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def traced_sample() -> tuple[Trace, str]:
    """What is read for one of the demo's questions, and the sentence that holds the answer."""
    llm = LLM(trace=True)
    sample = demo_samples(llm.loaded.tokenizer, _LENGTH)[_SAMPLE]
    llm.generate(raw_prompt(sample), max_new_tokens=_NEW_TOKENS)
    assert llm.trace is not None
    start = sample.prompt.index(sample.answer)
    sentence = sample.prompt[sample.prompt.rindex(". ", 0, start) + 2 : start + len(sample.answer) + 1]
    return llm.trace, sentence


def take_pictures(trace: Trace) -> None:
    """Draw every picture with a browser."""
    from playwright.sync_api import sync_playwright

    top = find_passages(trace, most=1)[0]
    view = f"#step={top.step}&layer={trace.layers.tolist().index(top.layer)}&token={top.token}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS)
        for name, width, height, scheme, is_close, scrolled in _SHOTS:
            page: Any = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(PAGE.as_uri() + (view if is_close else ""))
            page.wait_for_selector("body[data-ready]")
            page.eval_on_selector("aside", f"side => side.scrollTop = {scrolled}")
            page.wait_for_timeout(500)  # colours fade in
            page.screenshot(path=IMAGES / f"{name}.png")
        browser.close()


def main() -> None:
    """Ask, write the page, draw."""
    trace, sentence = traced_sample()
    PAGE.parent.mkdir(exist_ok=True)
    IMAGES.mkdir(exist_ok=True)
    write_page(trace, PAGE, sentence)
    take_pictures(trace)


if __name__ == "__main__":
    main()
