"""The report page in a real browser: what a reader can do on it, and what hostile text cannot.

Needs Playwright (the `dev` extra) and a chromium of the system; without either the tests are skipped.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from s2t.report import build, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install s2t[dev]")
expect = playwright.expect  # waits without evaluating text, which the page's policy forbids
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("greedy", "s2t", "s2t-local")
HOSTILE = [
    '</script><script>window.owned = "script"</script>',
    '<img src=x onerror="window.owned = 1">',
    "<!-- <script>",
    "--> ]]> \u2028\u2029 & &lt;b&gt; ${window.owned = 2} {{ 7 * 7 }}",
    "javascript:window.owned=3",
    "__proto__",
    "\ud800",
]
NARROW = {"width": 390, "height": 844}


class Opened:
    """A report in a tab of its own, with everything the browser complained about or asked for."""

    def __init__(self, browser: Browser, path: Path, **settings: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))
        start = time.perf_counter()
        self.page.goto(path.as_uri())
        expect(self.page.locator("html")).to_have_attribute("data-shown", re.compile("."))
        self.seconds = time.perf_counter() - start

    def shown(self, problem: int) -> None:
        """Wait until a problem is drawn."""
        expect(self.page.locator("html")).to_have_attribute("data-shown", str(problem))


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    found = Opened(browser, report)
    yield found
    assert found.errors == []
    assert [url for url in found.requests if not url.startswith("data:")] == [report.as_uri()]
    found.context.close()


def candidates(texts: list[str], taken: int, strategy: str) -> list[dict[str, Any]]:
    return [
        {
            "id": 100 + rank,
            "text": text,
            "slm_prob": 0.5**rank,
            "llm_prob": [0.25, 0.75][rank == taken] if strategy == "s2t" else None,
            "score": float(rank == taken) if strategy == "s2t-local" else None,
            "selected": rank == taken,
        }
        for rank, text in enumerate(texts)
    ]


def make_trace(strategy: str, problem: int, words: list[str]) -> dict[str, Any]:
    """Tokens t0 t1 ...; beside greedy, step 4 fires everywhere and flips in every fifth problem, which then is right."""
    steps: list[dict[str, Any]] = [{"token_id": i, "text": word} for i, word in enumerate(words)]
    flips = strategy != "greedy" and problem % 5 == 2
    if strategy != "greedy":
        for i, step in enumerate(steps):
            step["value"] = 0.9 if i == 4 else 0.05
        steps[4] |= {"fired": True, "candidates": candidates([words[4], " flipped", " c<b>"], int(flips), strategy)}
    if flips:
        old = {"greedy_id": steps[4]["token_id"], "greedy_text": words[4]}
        steps[4] |= old | {"token_id": 777, "text": " flipped", "flip": True}
    trace = {
        "problem_id": f"id-{problem}",
        "question": f"Question number {problem} about apples?",
        "gold": str(problem),
    }
    trace |= {"strategy": strategy, "is_correct": flips or problem % 7 == 0, "extracted": f"answer{problem}"}
    return trace | {"prompt_text": f"Prompt {problem}", "steps": steps}


def make_summary(names: tuple[str, ...], n: int) -> dict[str, Any]:
    counts = dict.fromkeys(("slm_tokens", "llm_tokens", "slm_forwards", "llm_forwards"), 1234)
    scores = {"accuracy": 0.5, "ci95": [0.4, 0.6], "num_problems": n, "trigger_rate": 0.01, "flip_rate": 0.01} | counts
    pair = {"slm": "tiny:slm", "llm": None}
    return {"task": "apples", "seed": 0, "num_test": n, "pair": pair, "strategies": dict.fromkeys(names, scores)}


def write_page(folder: Path, traces: list[dict[str, Any]], names: tuple[str, ...] = NAMES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    summary = make_summary(names, len(traces) // len(names))
    (folder / "manifest.json").write_text(json.dumps({"command": "eval", "config": {}, "status": "complete"}))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "draw", lambda summary, measured: [])
        return write_report(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 problems, three strategies; flips in problems 2, 7, 12, ..."""
    words = [f" t{i}" for i in range(40)]
    traces = [make_trace(name, problem, words) for name in NAMES for problem in range(100)]
    return write_page(tmp_path_factory.mktemp("report"), traces)


def token(side: int, step: int) -> str:
    return f'#pane-{side} .tok[data-index="{step}"]'


def test_the_page_opens_on_a_telling_problem(opened: Opened) -> None:
    page = opened.page
    opened.shown(2)  # the first one with a flip on which the strategies disagree
    assert page.inner_text("#pane-0 h3") == "greedy" and page.inner_text("#pane-1 h3") == "s2t-local"
    assert "wrong" in page.inner_text("#pane-0 .verdict") and "right" in page.inner_text("#pane-1 .verdict")
    assert page.inner_text("#said") == "First difference at token 5: “␣t4” on the left, “␣flipped” on the right."
    assert page.locator(".pane .tok.first").count() == 2
    assert page.locator(".pane .tok.flip").count() == 1
    assert page.locator("#list .row").count() < 30, "only the rows in view are drawn"


def test_a_click_pins_the_candidates_and_a_second_one_lets_go(opened: Opened) -> None:
    page = opened.page
    page.click(token(1, 4))
    said = page.inner_text("#card")
    for part in ("Token 5", "triggered, flipped", "criticality 0.9", "␣t4", "␣flipped", "␣c<b>", "1.000", "0.500"):
        assert part in said
    assert page.inner_text("#card tr.chosen .text") == "␣flipped"
    page.hover(token(0, 1))
    assert "Token 5" in page.inner_text("#card"), "a pinned card stays"
    page.click(token(1, 4))
    assert page.is_hidden("#card")
    page.click(token(1, 4))
    page.click("#card button")
    assert page.is_hidden("#card")


def test_pointing_shows_and_leaving_hides(opened: Opened) -> None:
    page = opened.page
    page.hover(token(1, 6))
    assert "Token 7 of s2t-local" in page.inner_text("#card") and "not triggered" in page.inner_text("#card")
    page.hover("h1")
    page.wait_for_selector("#card", state="hidden")


def test_another_strategy_shows_its_own_trace(opened: Opened) -> None:
    page = opened.page
    page.select_option("#right", label="s2t")
    expect(page.locator("#pane-1 h3")).to_have_text("s2t")
    page.click(token(1, 4))
    assert "0.750" in page.inner_text("#card tr.chosen"), "p_L, which s2t alone knows here"
    page.select_option("#left", label="s2t")
    expect(page.locator("#said")).to_have_text("Both wrote the same tokens.")
    assert page.is_disabled("#difference")


def test_search_and_filters_narrow_the_list(opened: Opened) -> None:
    page = opened.page
    assert page.inner_text("#found") == "100 problems"
    page.check("#only-flips")
    assert page.inner_text("#found") == "20 of 100 problems"
    page.check("#only-disagree")
    assert page.inner_text("#found") == "17 of 100 problems"  # both are right in 7, 42 and 77
    page.uncheck("#only-flips")
    page.fill("#search", "NUMBER 12 apples")
    assert page.inner_text("#found") == "1 of 100 problems"
    opened.shown(12)
    assert page.inner_text("#question p >> nth=0") == "Question number 12 about apples?"
    page.fill("#search", "answer93")
    page.uncheck("#only-disagree")
    opened.shown(93)
    page.fill("#search", "no such words")
    assert page.inner_text("#found") == "0 of 100 problems" and "No problem fits" in page.inner_text("#list")


def test_colour_follows_the_reading_that_is_chosen(opened: Opened) -> None:
    page = opened.page

    def heat(side: int, step: int) -> str:
        return page.eval_on_selector(token(side, step), "node => node.style.getPropertyValue('--v')")

    page.select_option("#measure", "criticality")
    assert (heat(0, 4), heat(1, 4), heat(1, 5)) == ("", "0.9", "0.05")
    assert "No criticality is known of greedy" in page.inner_text("#pane-0")
    page.select_option("#measure", label="nothing")
    assert heat(1, 4) == ""


def test_everything_can_be_done_with_the_keyboard(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("n d p")  # letters, not commands
    assert page.input_value("#search") == "n d p"
    page.fill("#search", "")
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("End")
    opened.shown(99)
    assert page.get_attribute("#row-99", "aria-selected") == "true"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    opened.shown(1)
    page.keyboard.press("n")  # no flip here: on to the next problem that has one
    opened.shown(2)
    expect(page.locator(".flip:focus")).to_have_count(1)
    assert "Token 5" in page.inner_text("#card") and "pinned" not in (page.get_attribute("#card", "class") or "")
    page.keyboard.press("Enter")
    assert "pinned" in (page.get_attribute("#card", "class") or "")
    page.keyboard.press("ArrowRight")
    assert "Token 6" in page.inner_text("#card")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")
    page.keyboard.press("d")
    assert page.evaluate("document.activeElement.classList.contains('first')")
    page.keyboard.press("n")
    opened.shown(7)
    page.keyboard.press("p")
    opened.shown(2)


def test_tab_reaches_what_happened_and_shows_it(opened: Opened) -> None:
    page = opened.page
    page.focus("#next-flip")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("[document.activeElement.closest('.pane')?.id, document.activeElement.dataset.index]")
        )
    assert reached == [["pane-0", "0"], ["pane-0", "4"], ["pane-1", "0"], ["pane-1", "4"]]
    assert page.is_visible("#card") and page.get_attribute(token(1, 4), "aria-describedby") == "card"


def test_next_flip_stays_within_what_the_filters_show(opened: Opened) -> None:
    page = opened.page
    page.fill("#search", "id-17")
    opened.shown(17)
    for _ in range(3):
        page.click("#next-flip")
        expect(page.locator(".flip:focus")).to_have_count(1)
        opened.shown(17)


def test_on_a_phone_nothing_sticks_out_and_a_tap_opens_the_card_below(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report, viewport=NARROW, has_touch=True, is_mobile=True)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    page.tap(token(1, 4))
    card, tapped = page.locator("#card").bounding_box(), page.locator(token(1, 4)).bounding_box()
    assert card is not None and tapped is not None
    assert (card["x"], card["width"]) == (0, NARROW["width"]) and card["y"] + card["height"] == NARROW["height"]
    assert tapped["y"] + tapped["height"] <= card["y"], "the tapped token stays in view"
    page.tap(token(1, 4))
    assert page.is_hidden("#card") and opened.errors == []
    opened.context.close()


WORDS = """() => {
  const broken = [];
  for (const element of document.querySelectorAll("header, header *"))
    for (const node of element.childNodes)
      if (node.nodeType === Node.TEXT_NODE)
        for (const match of node.data.matchAll(/[^\\s]+/g)) {
          const range = document.createRange();
          range.setStart(node, match.index);
          range.setEnd(node, match.index + match[0].length);
          if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) broken.push(match[0]);
        }
  return broken;
}"""


@pytest.mark.parametrize("width", [1200, 1000, 390])
def test_no_word_of_the_header_is_broken(browser: Browser, tmp_path: Path, width: int) -> None:
    words = [f" t{i}" for i in range(8)]
    page = write_page(tmp_path, [make_trace(name, 2, words) for name in NAMES])
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["pair"] = {"slm": "tiny:slm", "llm": "tiny:llm", "slm_params": 345_408, "llm_params": 678_912_345}
    summary |= {"gap_closed": 0.32, "task": "rg:gsm_symbolic,max_number=100"}
    summary["sufficiency"] = {"hit_rate": {"1": 0.376, "8": 0.934}, "trigger_rate": 0.031}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "draw", lambda summary, measured: [])
        write_report(tmp_path)
    opened = Opened(browser, page, viewport={"width": width, "height": 900})
    assert opened.page.evaluate(WORDS) == []
    assert "345 k parameters" in opened.page.inner_text("header").replace("\xa0", " ")
    opened.context.close()


def test_the_page_opens_with_what_came_out_and_a_repaired_answer(opened: Opened) -> None:
    page = opened.page
    tops = {name: page.locator(name).first.bounding_box() for name in (".lead", "#example", "#h-strategies", "#trace")}
    heights = [box["y"] for box in tops.values() if box is not None]
    assert len(heights) == 4 and heights == sorted(heights)
    assert page.inner_text(".lead").startswith("On 100 test problems s2t-local gets 50.0")
    assert page.inner_text("#example del") == " t4" and page.inner_text("#example ins") == " flipped"
    assert page.inner_text("#example mark") == " t4"
    assert "taken" in page.inner_text("#example .offer.taken")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, report: Path, scheme: str) -> None:
    opened = Opened(browser, report, color_scheme=scheme)
    read = "name => getComputedStyle(document.documentElement).getPropertyValue(name)"
    color = {
        name: rgb(opened.page.evaluate(read, f"--{name}")) for name in ("ink", "muted", "good", "bad", "mark", "flip")
    }
    paper, panel = (rgb(opened.page.evaluate(read, name)) for name in ("--paper", "--panel"))
    heat = [0.6 * h + 0.4 * p for h, p in zip(rgb(opened.page.evaluate(read, "--heat")), paper, strict=True)]
    for name, value in color.items():
        assert contrast(value, paper) >= 4.5, name
    assert contrast(color["muted"], panel) >= 4.5 and contrast(color["ink"], heat) >= 4.5
    opened.context.close()


def rgb(text: str) -> list[float]:
    if text.strip().startswith("#"):
        digits = text.strip()[1:]
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
    return [float(part) for part in text.split()]


def contrast(first: list[float], second: list[float]) -> float:
    """Contrast ratio as WCAG defines it."""
    lights = []
    for color in (first, second):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_on_paper_it_is_light_and_without_controls(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report, color_scheme="dark")
    page = opened.page
    page.click(token(1, 4))
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all(page.is_hidden(selector) for selector in ("#card", "#list", "#search", "#next-flip"))
    assert page.is_visible("#pane-1 .tok.flip") and page.is_visible("table")
    opened.context.close()


def test_hostile_text_is_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    names = ("greedy", HOSTILE[0], HOSTILE[1])
    traces = []
    for place, name in enumerate(names):
        for problem, text in enumerate(HOSTILE):
            trace = make_trace(("greedy", "s2t", "s2t-local")[place], 2, [*HOSTILE, *HOSTILE])
            trace |= {"strategy": name, "problem_id": f"{problem} {text}", "question": text, "gold": text}
            traces.append(trace | {"extracted": text, "prompt_text": text})
    opened = Opened(browser, write_page(tmp_path, traces, names))
    page = opened.page
    for problem, text in enumerate(HOSTILE):
        page.click(f"#row-{problem}")
        opened.shown(problem)
        page.click("summary")
        shown = text.replace("\ud800", "\ufffd")
        assert page.text_content("#question p >> nth=0") == shown == page.text_content("#question pre")
        for side in (0, 1):
            for step in {4, problem}:
                page.click(token(side, step))
                assert page.is_visible("#card")
                page.keyboard.press("Escape")
    assert page.text_content(token(0, 0)) == HOSTILE[0]
    assert page.locator("main script, main img, #list b, .pane b").count() == 0
    assert page.evaluate("window.owned") is None and opened.errors == []
    opened.context.close()


def test_the_policy_stops_a_script_that_got_in(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.owned = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='x:y' onerror='window.owned = 2'>");
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.owned") is None
    assert any("Content Security Policy" in error for error in opened.errors)
    opened.context.close()


@pytest.mark.slow
def test_two_thousand_problems_of_three_hundred_tokens_open_at_once(browser: Browser, tmp_path: Path) -> None:
    draw = random.Random(0)
    vocabulary = [f" {draw.randrange(16**6):x}" for _ in range(5000)]
    names = ("greedy", "s2t-local")
    traces = []
    for name in names:
        for problem in range(2000):
            words = [vocabulary[int(5000 * draw.random() ** 3)] for _ in range(300)]
            trace = make_trace(name, problem, words)
            for step in trace["steps"]:
                step |= {"divergence": draw.random() ** 4, "value": draw.random() ** 4}
            for step in draw.sample(trace["steps"], 15):
                offered = candidates(draw.choices(vocabulary, k=8), 0, name)
                for candidate in offered:
                    candidate |= {key: draw.random() for key in ("slm_prob", "llm_prob", "score")}
                step |= {"fired": True, "candidates": offered}
            traces.append(trace | {"question": "".join(draw.choices(vocabulary, k=40))})
    start = time.perf_counter()
    path = write_page(tmp_path, traces, names)
    written = time.perf_counter() - start
    opened = Opened(browser, path)
    size = path.stat().st_size
    print(f"\n{size / 1e6:.1f} MB, written in {written:.1f} s, opened in {opened.seconds:.2f} s")
    assert size < 50e6 and opened.seconds < 10
    start = time.perf_counter()
    opened.page.focus("#list")
    opened.page.keyboard.press("End")
    opened.shown(1999)
    opened.page.fill("#search", "zzzz")
    assert opened.page.inner_text("#found") == "0 of 2,000 problems"
    print(f"the last problem, then a search, in {time.perf_counter() - start:.2f} s")
    assert len(re.findall("tok", opened.page.inner_html(".panes"))) < 2000 and opened.errors == []
    opened.context.close()
