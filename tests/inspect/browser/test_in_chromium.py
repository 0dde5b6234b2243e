"""The page in a browser: sliders change the heat, the needle is hottest, text stays text, large pages stay light."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tab import Tab
from traces import made_trace

from tokenselect.inspect import write_page
from tokenselect.trace import Trace


@pytest.fixture(scope="session")
def needle() -> tuple[Trace, str]:
    """A number that the embedded model finds in a real text, and what it is."""
    from tokenselect import LLM, TokenSelectConfig
    from tokenselect.evals import fact_in_text, raw_prompt, state_of_the_union

    config = TokenSelectConfig(num_dense_tokens=0, num_selected_tokens=256, num_local_tokens=256, reuse_threshold=0.95)
    llm = LLM(config=config, trace=True)
    sample = fact_in_text(llm.loaded.tokenizer, state_of_the_union(), 2500, 0.4, "magic number")
    answer = llm.generate(raw_prompt(sample), max_new_tokens=8)
    assert sample.answer in answer.text
    assert llm.trace is not None
    return llm.trace, sample.answer


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_page(made_trace(), tmp_path / "made.html")
    return tmp_path / "made.html"


def colours(page: Any) -> dict[str, str]:
    """Background of every token that has one, by its text."""
    return page.eval_on_selector_all(
        "#text span",
        "spans => Object.fromEntries(spans.filter(s => s.style.backgroundColor)"
        ".map(s => [s.textContent.trim(), s.style.backgroundColor]))",
    )


def slide(page: Any, name: str, value: int) -> None:
    page.eval_on_selector(f"#{name}", f"s => {{ s.value = {value}; s.dispatchEvent(new Event('input')) }}")


def test_sliders_change_the_heat(tab: Tab, made: Path) -> None:
    page = tab.open(made)
    assert set(colours(page)) == {"word10", "word30", "word50", "word90"}
    slide(page, "step", 2)
    assert set(colours(page)) == {"word50"}
    slide(page, "step", 3)
    assert set(colours(page)) == {"word10", "word30", "word90"}
    slide(page, "layer", 1)
    assert set(colours(page)) == {"word10"}
    assert page.inner_text("#layer-name") == "0"
    assert "3 of 3" in page.inner_text("#step-name")
    assert "#step=2&layer=0" in page.url


def test_a_link_opens_the_same_view(tab: Tab, made: Path) -> None:
    page = tab.open(made, "#step=1&layer=0&token=50")
    assert set(colours(page)) == {"word50"}
    assert "token 50 of 103" in page.inner_text("#why")
    assert "Selected 1 times of 6" in page.inner_text("#why")


@pytest.mark.parametrize("state", ["#step=99&layer=-7&token=x", "#step=<b>&token=1e9", "#%"])
def test_a_wrong_link_shows_everything(tab: Tab, made: Path, state: str) -> None:
    page = tab.open(made, state)
    assert page.inner_text("#step-name") == "all"
    assert page.inner_text("#layer-name") == "all"


def test_keys(tab: Tab, made: Path) -> None:
    page = tab.open(made)
    page.keyboard.press("]")
    page.keyboard.press("]")
    assert "2 of 3" in page.inner_text("#step-name")
    page.keyboard.press("[")
    page.keyboard.press("}")
    assert "1 of 3" in page.inner_text("#step-name")
    assert page.inner_text("#layer-name") == "0"
    page.keyboard.press("n")
    assert "“ word30”" in page.inner_text("#why")
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    assert "“ word31”" in page.inner_text("#why")
    page.focus("#minimap")
    page.keyboard.press("End")
    assert page.get_attribute("#minimap", "aria-valuemax") == "102"


def test_pointing_at_a_token_says_why(tab: Tab, made: Path) -> None:
    page = tab.open(made)
    page.hover("#text span[data-token='30']")
    why = page.inner_text("#why")
    assert "depth 30.0%" in why
    assert "Vote 50.00%: layer 5" in why
    assert why.count("head ") == 3
    assert "Selected 3 times of 6" in why
    page.hover("#text span[data-token='0']")
    assert "Always attended: one of the first tokens" in page.inner_text("#why")
    page.hover("#text span[data-token='98']")
    assert "in the local window" in page.inner_text("#why")


def test_find_says_depth_and_rank(tab: Tab, made: Path) -> None:
    page = tab.open(made)
    page.fill("#query", "word30 word31")
    page.keyboard.press("Enter")
    assert page.inner_text("#found") == "token 30, depth 30.0%: its passage is number 1 of 4 selected"
    assert page.eval_on_selector_all("#text .marked", "all => all.map(s => s.dataset.token)") == ["30", "31"]
    page.fill("#query", "nowhere")
    page.keyboard.press("Enter")
    assert page.inner_text("#found") == "not found"


def test_charts_are_drawn(tab: Tab, made: Path) -> None:
    page = tab.open(made)
    for name in ("depth-chart", "map-chart", "layers-chart", "minimap"):
        canvas = f"#{name}" if name == "minimap" else f"#{name} canvas"
        drawn = page.eval_on_selector(
            canvas,
            "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size",
        )
        assert drawn > 3, name
    assert "Selection Cache hits" in page.inner_text("#layers-chart")
    assert "dense attention mass" in page.inner_text("#layers-chart")


def test_the_needle_is_the_hottest_passage(tab: Tab, needle: tuple[Trace, str], tmp_path: Path) -> None:
    trace, key = needle
    write_page(trace, tmp_path / "needle.html")
    page = tab.open(tmp_path / "needle.html")
    assert key in page.inner_text("#passages li:first-child")
    # the number's first digit is written after a space
    written = [trace.text_of(i, i + 1) for i in range(trace.num_prompt_tokens, trace.num_tokens)]
    for digit in key[1:3]:
        step = next(i for i, text in enumerate(written) if text.strip() == digit)
        page.click(f"#answer button:nth-child({step + 1})")
        assert key in page.inner_text("#passages li:first-child")
    page.fill("#query", key)
    page.keyboard.press("Enter")
    assert "its passage is number 1 of" in page.inner_text("#found")


def test_a_document_of_html_and_script_stays_text(tab: Tab, tmp_path: Path) -> None:
    parts = ["</script><script>alert(1)</script>", "<img/src=x/onerror=alert(2)>", "<svg/onload=alert(3)>", "&lt;b&gt;"]
    text = " ".join(parts[i % 4] if i % 2 else f"<h1>{i}</h1>" for i in range(103))
    trace = made_trace(text, facts={**made_trace().facts, "model": parts[1]})
    write_page(trace, tmp_path / "hostile.html")
    page = tab.open(tmp_path / "hostile.html")
    page.hover("#text span[data-token='1']")
    assert page.eval_on_selector_all(".words", "all => all.map(w => w.textContent).join('')") == text
    assert page.query_selector_all("img, svg, #text h1, #text script") == []
    assert parts[1] in page.inner_text("#summary")


def test_a_large_context_has_few_elements(tab: Tab, tmp_path: Path) -> None:
    count = 100_000
    words = " ".join(f"word{i}." if i % 20 == 19 else f"word{i}" for i in range(count + 3))
    positions = np.arange(0, count - 100, 50)
    cells = [[(int(p) + c, 1e-4 * (1 + p % 7)) for p in positions] for c in range(6)]
    trace = made_trace(words, count, cells, windows=np.full((3, 2), count - 10, np.int32))
    write_page(trace, tmp_path / "large.html")
    page = tab.open(tmp_path / "large.html")
    page.focus("#minimap")
    for _ in range(4):
        page.keyboard.press("PageDown")
        page.wait_for_timeout(50)
    assert page.evaluate("document.querySelector('#text').textContent.includes('word99999')")
    page.wait_for_function("document.querySelectorAll('#text span').length < 5000")
    seen = page.eval_on_selector_all("#text span", "all => Math.min(...all.map(s => +s.dataset.token))")
    assert seen > 1000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen(browser: Any, made: Path, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)
    tab = Tab(context.new_page())
    page = tab.open(made)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#text").bounding_box()["height"] > 200
    assert len(colours(page)) == 4
    context.close()
    assert tab.complaints == []
