"""A real browser: Debian's Chromium, driven by Playwright. Without one these tests fail, and say what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tab import Tab

_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("these tests need Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    """Fails the test if the page complained or fetched anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    made = Tab(context.new_page())
    yield made
    context.close()
    assert made.complaints == []
    assert {url.split("#")[0].split(":")[0] for url in made.requests} <= {"file"}
