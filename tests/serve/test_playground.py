"""The playground in a real browser: what a reader can do on it, and what hostile text cannot.

Needs Playwright (the `dev` extra) and a chromium of the system; without either the tests are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import s2t.serve
from s2t.serve.answers import WireTokens
from s2t.web import source

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install s2t[dev]")

PROBLEM = "Ava has 3 apples and buys 4 more. How many apples has she?"
HOSTILE = '<img src=x onerror="window.owned=1"></script><script>window.owned=2</script>'
NARROW = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


@contextmanager
def opened(browser: Any, server: Any, **settings: Any) -> Iterator[Any]:
    """The playground in a tab; it must ask nobody but the server, and no error may be said."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    urls: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server.url + "/")
    try:
        yield page
        assert [text for text in errors if not re.search(r"status of 40[01]", text)] == []
        assert [url for url in urls if not url.startswith((server.url, "data:"))] == []
    finally:
        context.close()


def answer(page: Any, problem: str = PROBLEM) -> None:
    page.wait_for_selector("html[data-ready]")
    page.fill("#problem", problem)
    page.click("#run")
    page.wait_for_selector("html[data-shown='1']")


def text_of(page: Any, side: int) -> str:
    """What a pane says, without the marks for line ends and empty tokens."""
    return page.eval_on_selector(
        f"#pane-{side} .tokens",
        "(node) => { const copy = node.cloneNode(true); copy.querySelectorAll('.ghost').forEach((g) => g.remove()); "
        "return copy.textContent; }",
    )


def test_the_header_tells_what_runs_the_model(browser, server):
    with opened(browser, server) as page:
        page.wait_for_selector("html[data-ready]")
        told = page.inner_text("#about")
    assert "It runs on torch (float32), reads " in told
    assert re.search(r"takes about [\d.]+ MB of memory\.$", told)


def test_both_answers_are_those_of_the_python_interface(browser, server):
    with opened(browser, server) as page:
        answer(page)
        for side, strategy in enumerate(("greedy", "s2t-local")):
            turns = [{"role": "user", "content": PROBLEM}]
            threshold = {"threshold": 0.5} if strategy == "s2t-local" else {}
            alone = server.reasoner.generate(turns, strategy, max_new_tokens=160, **threshold)
            assert text_of(page, side) == alone.text
            figures = page.inner_text(f"#pane-{side} .figures")
            count = len(alone.token_ids) - (alone.finish_reason == "stop")
            assert re.search(rf"\b{count}\s+tokens", figures)
            assert "tokens/s" in figures
            if strategy == "s2t-local":
                assert re.search(rf"\b{alone.num_flips}\s+flip", figures)
                assert page.locator("#pane-1 .tok.flip").count() == alone.num_flips > 0
        assert "First difference at token" in page.inner_text("#said")
        assert page.locator(".tokens .tok.first").count() == 2


def test_a_token_shows_its_candidates_by_mouse_and_by_keyboard(browser, server):
    with opened(browser, server) as page:
        answer(page)
        flip = page.locator("#pane-1 .tok.flip").first
        flip.hover()
        card = page.locator("#card")
        card.wait_for(state="visible")
        assert "triggered, flipped" in card.inner_text()
        assert "Score" in card.inner_text()
        assert card.locator("tr.chosen").count() == 1
        flip.click()
        assert card.get_by_role("button", name="Close").is_visible()
        page.keyboard.press("Escape")
        assert card.is_hidden()
        page.locator("h1").click()
        page.keyboard.press("n")
        assert page.evaluate("document.activeElement.className").split()[:1] == ["tok"]
        assert "flip" in page.evaluate("document.activeElement.className")
        before = page.evaluate("document.activeElement.dataset.index")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.dataset.index") == str(int(before) - 1)
        page.keyboard.press("Enter")
        assert card.get_by_role("button", name="Close").is_visible()


def test_it_can_be_used_with_the_keyboard_alone(browser, server):
    with opened(browser, server) as page:
        page.wait_for_selector("html[data-ready]")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "problem"
        page.keyboard.press("Control+A")
        page.keyboard.type("2 + 2 = ?")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("html[data-shown='1']")
        assert page.locator("#pane-0 .tok").count() > 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, server, scheme):
    with opened(browser, server, color_scheme=scheme, **NARROW) as page:
        answer(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        boxes = [page.locator(f"#pane-{side}").bounding_box() for side in (0, 1)]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
        page.locator("#pane-1 .tok.fired").first.tap()
        card = page.locator("#card").bounding_box()
        assert card["x"] == 0
        assert card["width"] == 390
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")


def test_colour_follows_what_is_chosen(browser, server):
    with opened(browser, server) as page:
        answer(page)
        heats = "() => [...document.querySelectorAll('#pane-0 .tok')].map((t) => Number(t.style.getPropertyValue('--v') || 0))"
        by_criticality = page.evaluate(heats)
        assert len(set(by_criticality)) > 3
        page.select_option("#measure", "uncertainty")
        assert page.evaluate(heats) != by_criticality
        page.select_option("#measure", "")
        assert set(page.evaluate(heats)) == {0}


def test_hostile_text_stays_text(browser, server, monkeypatch):
    monkeypatch.setattr(WireTokens, "text", lambda self, token_id: HOSTILE)
    with opened(browser, server) as page:
        answer(page, HOSTILE)
        page.locator("#pane-1 .tok.fired").first.click()
        assert HOSTILE in page.inner_text("#pane-0 .tokens")
        assert HOSTILE in page.inner_text("#pane-1 .tokens")
        assert "onerror" in page.inner_text("#card")
        assert page.evaluate("window.owned === undefined")
        assert page.locator("main img").count() == 0


def test_stopping_frees_the_rows(browser, serve):
    with serve(endless=True) as server, opened(browser, server) as page:
        page.wait_for_selector("html[data-ready]")
        page.fill("#length", "480")
        page.click("#run")
        page.wait_for_selector("#pane-1 .tok >> nth=3")
        page.click("#stop")
        page.wait_for_selector("html[data-shown='1']")
        assert "stopped" in page.inner_text("#pane-0 .figures") + page.inner_text("#pane-1 .figures")
        assert server.idle()


def test_a_refusal_is_shown(browser, server):
    with opened(browser, server) as page:
        page.wait_for_selector("html[data-ready]")
        page.fill("#problem", "word " * 600)
        with page.expect_response(lambda response: response.status == 400):
            page.click("#run")
        page.wait_for_selector("#pane-0 .wrong")
        assert "512 tokens" in page.inner_text("#pane-0")
        page.wait_for_selector("html[data-shown='1']")


def test_a_server_with_a_key_asks_for_it(browser, serve, monkeypatch):
    monkeypatch.setenv("S2T_API_KEY", "sk-page")
    with serve() as server, opened(browser, server) as page:
        page.wait_for_selector("#key", state="visible")
        assert "asks for a key" in page.inner_text("#said")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#said.wrong >> text=not the server's")
        page.fill("#key", "sk-page")
        page.press("#key", "Enter")
        answer(page)
        assert page.locator("#pane-0 .tok").count() > 1
        assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0


def test_the_script_writes_text_only():
    page = Path(s2t.serve.__file__).parent / "page"
    for text in (*(path.read_text(encoding="utf-8") for path in page.iterdir()), source("tokens.js")):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|eval\(|new Function", text
        )
        assert not re.search(r"https?://", text)
