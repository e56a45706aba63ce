"""The report of a synthetic run: what is on the page, what cannot happen on it, what fails clearly."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from s2t.errors import DataError, MissingExtraError
from s2t.report import build, plots, write_report
from s2t.report.figure import panels
from s2t.report.trace import Traces, load_traces, script_json, unpack
from s2t.web import source

NAMES = ("greedy", "sample", "self-consistency", "llm", "takeover", "s2t", "s2t-local")
EVIL = '</script><script>alert("x")</script><!-- <img src=x onerror=alert(1)>\u2028&amp;'
PNG = b"\x89PNG\r\n\x1a\n"


def scores(name: str, accuracy: float, n: int = 500) -> dict[str, Any]:
    needs_llm = name in ("llm", "takeover", "s2t")
    tokens, samples = 210 * n, 8 if name == "self-consistency" else 1
    llm_forwards = {"llm": tokens, "takeover": tokens, "s2t": tokens}.get(name, 0)
    slm_forwards = 0 if name == "llm" else samples * tokens + (9 * n if name == "s2t-local" else 0)
    fires = name in ("takeover", "s2t", "s2t-local")
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    entry = {
        "accuracy": accuracy,
        "ci95": [accuracy - half, accuracy + half],
        "num_problems": n,
        "slm_tokens": 0 if name == "llm" else samples * tokens,
        "llm_tokens": tokens if name == "llm" else 0,
        "slm_forwards": slm_forwards,
        "llm_forwards": llm_forwards,
        "slm_processed": slm_forwards + 90 * n,
        "llm_processed": llm_forwards + 90 * n if needs_llm else 0,
        "slm_flops": 2 * 3.1e6 * slm_forwards,
        "llm_flops": 2 * 2.9e7 * llm_forwards,
        "trigger_rate": 0.051 if fires else None,
        "flip_rate": 0.022 if fires else None,
        "seconds": 41.7 + 80 * needs_llm + 12 * samples,
    }
    return entry | ({"pass_at_n": 0.781, "num_samples": 8} if samples > 1 else {})


def make_summary(names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    accuracy: dict[str, float] = dict(zip(NAMES, (0.412, 0.386, 0.518, 0.874, 0.846, 0.838, 0.592), strict=True))
    test = {"difference": 0.18, "ci95": [0.134, 0.226], "p_value": 3e-12, "p_holm": 0.0125, "wins": 121, "losses": 31}
    close = {"difference": -0.008, "ci95": [-0.026, 0.01], "p_value": 0.424, "wins": 9, "losses": 13}
    paired = {"s2t-local vs greedy": test, "s2t vs takeover": close}

    def part(n: int, shift: float) -> dict[str, Any]:
        found = {name: scores(name, accuracy[name] + shift, n) for name in names}
        return {"num_problems": n, "strategies": found, "paired": paired}

    return {
        "task": "rg:gsm_symbolic,max_number=100",
        "seed": 0,
        "num_test": 500,
        "pair": {"slm": "tiny:slm", "llm": "tiny:llm", "slm_params": 3_100_000, "llm_params": 29_000_000},
        "sufficiency": {
            "num_divergence_points": 4820,
            "trigger_rate": 0.05,
            "hit_rate": {"1": 0.329, "2": 0.661, "4": 0.868, "8": 0.958, "16": 0.985},
        },
        "strategies": {name: scores(name, accuracy[name]) for name in names},
        "paired": paired,
        "seen_templates": part(371, 0.01),
        "unseen_templates": part(129, -0.029),
        "gap_closed": 0.4225,
    }


def make_measure() -> dict[str, Any]:
    rates = make_summary()["sufficiency"]["hit_rate"]
    edges = [0.0, 0.05, 0.2, 0.5, 1.0, 2.0, None]
    bins = []
    for index, (low, high) in enumerate(pairwise(edges)):
        hit = {k: 1 - (1 - rate) * index / 5 for k, rate in rates.items()}
        bins.append({"low": low, "high": high, "num_steps": 61803 // 4**index, "hit_rate": hit})
    return {
        "num_steps": 96400,
        "num_divergence_points": 4820,
        "trigger_rate": 0.05,
        "threshold": 0.83,
        "quantile": 0.95,
        "hit_rate": rates,
        "hit_rate_ci95": {k: [rate - 0.013, min(1, rate + 0.013)] for k, rate in rates.items()},
        "hit_rate_by_divergence": bins,
    }


def make_trace(strategy: str, problem: int, text: str, flips: dict[int, str], is_correct: bool) -> dict[str, Any]:
    """A trace of `text` cut into words; `flips` maps a step to the greedy token it replaced."""
    draw = random.Random(f"{problem} {text}")
    steps = []
    for index, piece in enumerate(re.findall(r"\n|\s?[^\s]+", text)):
        fired = strategy != "greedy" and (index in flips or index % 17 == 5)
        greedy = flips.get(index, piece)
        value = draw.uniform(0.72, 0.98) if fired else draw.random() ** 4 * 0.6
        offered = [greedy, piece, " so", " the", "\n"] if piece != greedy else [piece, " and", " so", " the", "\n"]
        candidates = [
            {
                "id": crc32(offer.encode()) % 9999,
                "text": offer,
                "slm_prob": 0.52 / 2**rank,
                "llm_prob": 0.9 / 9 ** abs(offered.index(piece) - rank) if strategy == "s2t" else None,
                "score": 11.2 - abs(offered.index(piece) - rank) if strategy == "s2t-local" else None,
                "selected": offer == piece,
            }
            for rank, offer in enumerate(offered)
        ]
        step: dict[str, Any] = {"token_id": crc32(piece.encode()) % 9999, "text": piece}
        if piece != greedy:
            step |= {"greedy_id": 7, "greedy_text": greedy, "flip": True}
        if strategy != "greedy":
            step["value"] = value
        steps.append(step | ({"fired": True, "candidates": candidates} if fired else {}))
    question = "Mara fills 3 boxes with 14 pears each and gives 9 pears away. How many pears are left?"
    extracted = text.rsplit(" ", 1)[-1]
    trace = {"problem_id": f"rg-{problem:04d}", "question": question, "gold": "33", "strategy": strategy}
    trace |= {
        "is_correct": is_correct,
        "extracted": extracted,
        "prompt_text": f"Question: {question}\nAnswer:",
    }
    return trace | {"steps": steps}


def make_traces() -> list[dict[str, Any]]:
    start = "Mara has 3 boxes with 14 pears in each, so she starts with 3 * 14 = 42 pears.\nShe gives away"
    right = start + " 9 pears, and that leaves 42 - 9 = 33 pears for her to keep.\nThe answer is #### 33"
    wrong = start + " 3 * 9 = 27 pears, and that leaves 42 - 27 = 15 pears.\nThe answer is #### 15"
    at = len(re.findall(r"\n|\s?[^\s]+", start))
    traces = []
    for problem in range(3):
        first = problem == 0
        traces.append(make_trace("greedy", problem, right if first else wrong, {}, first))
        for name in ("s2t", "s2t-local"):
            traces.append(make_trace(name, problem, right, {} if first else {at: " 3"}, True))
    return traces


def write_run(folder: Path, command: str, files: dict[str, Any], status: str = "complete") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"command": command, "config": {"trigger": "auto"}, "seed": 0, "status": status}
    for name, data in (files | {"manifest.json": manifest | {"versions": {"s2t": "0.1.0", "peft": None}}}).items():
        lines = [json.dumps(line) for line in data] if name.endswith("l") else [json.dumps(data)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "eval", "eval", {"summary.json": make_summary(), "traces.jsonl": make_traces()})


@pytest.fixture
def measure(tmp_path: Path) -> Path:
    return write_run(tmp_path / "measure", "measure", {"measure.json": make_measure()})


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is the slow part; a test of something else goes without."""
    monkeypatch.setattr(build, "draw", lambda summary, measured: [])


class Page(HTMLParser):
    """Tags with their attributes, the text of each script, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data


def test_page_names_every_strategy_with_its_numbers(run: Path, measure: Path) -> None:
    page = Page(write_report(run, measure=measure, note="Made by hand.\n\nTwice.").read_text())
    for name in NAMES:
        assert page.text.count(name) >= 2  # overall, and by template
    for said in (
        "59.2",
        "pass@8: 78.1 %",
        "+18.0",
        "< 0.001",
        "121 / 31",
        "p (Holm)",
        "0.013",
        "those of one seed on average",
        "solves more often",
        "42 % of greedy to s2t",
        "32.9 %, 95.8 %",
    ):
        assert said in page.text
    for entry in make_summary()["strategies"].values():
        for key in ("num_problems", "slm_tokens", "llm_tokens", "slm_forwards", "llm_forwards"):
            assert f"{entry[key]:,}" in page.text
    assert "Made by hand." in page.text and "Twice." in page.text
    assert "n\xa0=\xa0371" in page.text and "n\xa0=\xa0129" in page.text


def test_page_loads_nothing_from_outside(run: Path, measure: Path) -> None:
    html = write_report(run, measure=measure).read_text()
    assert not re.search(r"https?://|@import|url\(", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for key in ("src", "srcset", "href"):
            assert (attributes.get(key) or "data:").startswith("data:")


FIELDS = ["text", "greedy_text", "question", "gold", "extracted", "candidate", "strategy", "prompt_text", "problem_id"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.usefixtures("no_pictures")
def test_model_text_cannot_leave_its_script_element(tmp_path: Path, field: str) -> None:
    traces = make_traces()
    for trace in traces[-3:]:
        if field == "text":
            trace["steps"][3]["text"] = EVIL
        elif field == "greedy_text":
            trace["steps"][3] |= {"greedy_id": 9, "greedy_text": EVIL}
        elif field == "candidate":
            trace["steps"][5]["candidates"] = [
                {"id": 1, "text": EVIL, "slm_prob": 1.0, "llm_prob": None, "score": None}
            ]
            trace["steps"][5]["candidates"][0]["selected"] = True
        else:
            trace[field] = EVIL
    run = write_run(tmp_path, "eval", {"summary.json": make_summary(), "traces.jsonl": traces})
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    index, *blocks, script = page.scripts
    num_strategies = len({trace["strategy"] for trace in traces})
    assert [tag for tag, _ in page.tags].count("script") == len(page.scripts) == 4 + num_strategies
    assert script == source("tokens.js") + Path(plots.__file__).with_name("report.js").read_text()
    assert "\u2028" not in html and "onerror=alert" not in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    data = json.dumps([json.loads(index), [unpack(block) for block in blocks]])
    assert json.dumps(EVIL)[1:-1] in data
    assert all(re.fullmatch(r"[A-Za-z0-9+/=]+", block) for block in blocks)


@pytest.mark.usefixtures("no_pictures")
def test_summary_and_note_are_escaped(tmp_path: Path) -> None:
    summary = make_summary()
    summary["task"] = EVIL
    summary["paired"][EVIL] = summary["paired"]["s2t vs takeover"]
    summary["strategies"][EVIL] = scores(EVIL, 0.5)
    run = write_run(tmp_path, "eval", {"summary.json": summary})
    page = Page(write_report(run, note=EVIL).read_text(encoding="utf-8"))
    assert page.scripts == []
    assert page.text.count('<script>alert("x")</script>') >= 4


def test_script_writes_text_only() -> None:
    texts = [Path(plots.__file__).with_name(name).read_text() for name in ("report.js", "report.html")]
    for text in (*texts, source("tokens.js")):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|eval\(|new Function|\|\s*safe", text
        )


@pytest.mark.usefixtures("no_pictures")
def test_only_the_pages_own_script_and_style_are_allowed(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    [policy] = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy is not None and "unsafe" not in policy and "default-src 'none'" in policy
    [style] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    for directive, text in (("script-src", page.scripts[-1]), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    for _, attributes in page.tags:
        assert not any(name == "style" or name.startswith("on") for name in attributes)


@pytest.mark.usefixtures("no_pictures")
def test_text_without_a_utf8_form_is_replaced(tmp_path: Path) -> None:
    traces = make_traces()
    traces[0]["steps"][0]["text"] = "\ud800"
    run = write_run(tmp_path, "eval", {"summary.json": make_summary() | {"task": "\ud800"}, "traces.jsonl": traces})
    assert "<h1>?</h1>" in write_report(run).read_text(encoding="utf-8")
    data = load_traces(run / "traces.jsonl", {})
    assert data is not None and unpack(data.blocks["pieces"])[0][1] == "\ud800"


def test_script_json_is_ascii_and_has_no_nan() -> None:
    text = script_json({"a": [EVIL, math.nan, math.inf, "\ud800"], "b": {"c": (1.5, None)}})
    assert text.isascii() and not set(text) & set("<>&")
    assert json.loads(text) == {"a": [EVIL, None, None, "\ud800"], "b": {"c": [1.5, None]}}


def test_pictures_are_real_pngs(run: Path, measure: Path, tmp_path: Path) -> None:
    path = write_report(str(run), out=tmp_path / "page", measure=str(measure))
    assert path == tmp_path / "page" / "report.html"
    pictures = sorted((tmp_path / "page" / "plots").iterdir())
    assert [picture.name for picture in pictures] == [
        "accuracy_cost.png",
        "hit_at_k.png",
        "hit_by_divergence.png",
        "rank_ring.png",
    ]
    for picture in pictures:
        data = picture.read_bytes()
        assert data.startswith(PNG) and data.endswith(b"IEND\xaeB`\x82")
        assert int.from_bytes(data[16:20]) >= 1000  # pixels across
    assert not (run / "plots").exists()


def test_without_measure_the_curve_comes_from_the_summary(run: Path, measure: Path) -> None:
    write_report(run, measure=measure)
    write_report(run)  # the picture only the measure run could give must not linger
    assert sorted(path.name for path in (run / "plots").iterdir()) == [
        "accuracy_cost.png",
        "hit_at_k.png",
        "rank_ring.png",
    ]


def test_page_without_optional_parts(tmp_path: Path) -> None:
    summary = make_summary(("greedy",)) | {"sufficiency": None, "paired": {}, "gap_closed": None}
    summary |= {"seen_templates": None, "unseen_templates": None}
    summary["pair"] |= {"llm": None, "llm_params": None}
    page = Page(write_report(write_run(tmp_path, "eval", {"summary.json": summary})).read_text())
    for absent in (
        "Paired comparisons",
        "Seen and unseen",
        "Token by token",
        "Gap closed",
        "Local sufficiency",
        "Where the LLM's token stands",
    ):
        assert absent not in page.text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["accuracy_cost.png"]


@pytest.mark.parametrize("layout", ["same", "column", "row"])
def test_labels_never_overlap(layout: str) -> None:
    from matplotlib.text import Text

    figure, [axes] = panels()
    spread = range(len(NAMES))
    points = [(10 + (layout == "row") * 0.3 * i, 50 + (layout == "column") * 0.5 * i) for i in spread]
    axes.set(xlim=(1, 100), ylim=(40, 60), xscale="log")
    notes = plots.place_labels(axes, points, NAMES, [(y - 3, y + 3) for _, y in points])
    figure.canvas.draw()
    boxes = [Text.get_window_extent(note) for note in notes]
    inside = axes.get_window_extent()
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1


def test_cost_falls_back_to_forwards() -> None:
    strategies = {"greedy": scores("greedy", 0.4) | {"slm_flops": None}, "s2t": scores("s2t", 0.8)}
    costs, label = plots._costs(strategies)
    assert label.startswith("total forwards") and costs["greedy"] == strategies["greedy"]["slm_forwards"]


def test_ring_shares_are_hit_rates() -> None:
    assert plots.rank_shares({"1": 0.25, "8": 0.75, "16": 0.9}) == (0.25, 0.5, 0.25)
    assert plots.rank_shares({"1": 0.25}) is None and plots.rank_shares({"1": None, "8": 0.5}) is None


def test_pair_and_scales_follow_the_run(run: Path) -> None:
    data = load_traces(run / "traces.jsonl", {"trigger": "auto"})
    assert data is not None
    assert [data.index["strategies"][place] for place in data.index["pair"]] == ["greedy", "s2t-local"]
    assert list(data.index["measures"]) == ["divergence", "criticality"]
    assert data.index["measures"]["criticality"] == {"unit": "", "top": 1.0}
    assert data.index["measures"]["divergence"]["unit"] == "nats" and data.index["measures"]["divergence"]["top"] > 0.7
    assert load_traces(run / "missing.jsonl", {}) is None


@pytest.mark.parametrize("setting", ["auto", "entropy"])
def test_the_trigger_behind_the_at_sign_names_the_reading(tmp_path: Path, setting: str) -> None:
    names = ("s2t@divergence", "s2t@entropy", "takeover@random")
    traces = [make_trace(name, 0, "so 3 boxes hold 42 pears", {}, True) for name in names]
    write_run(tmp_path, "eval", {"traces.jsonl": traces})
    data = load_traces(tmp_path / "traces.jsonl", {"trigger": setting})
    assert data is not None
    assert {name: measure["unit"] for name, measure in data.index["measures"].items()} == {
        "divergence": "nats",
        "entropy": "nats",
        "random": "",
    }
    for name in names:
        first = read_back(data, name, 0)[0]
        assert {"divergence", "entropy", "random"} & set(first) == {name.partition("@")[2]}


def test_a_strategy_keeps_its_colour_under_another_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_OTHER_STYLE", ("#123456", "X"))
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda self, *_, **style: drawn.append(style["color"]))
    plots.accuracy_cost({name: scores("s2t", 0.8) for name in ("s2t", "s2t@entropy")})
    assert drawn == [plots._STYLES["s2t"][0]] * 2


def read_back(data: Traces, strategy: str, problem: int) -> list[dict[str, Any]]:
    """The steps of one run as the page's script reads them."""
    block, place = divmod(problem, data.index["blockSize"])
    run = unpack(data.blocks[f"{data.index['strategies'].index(strategy)}-{block}"])[place]
    pieces = unpack(data.blocks["pieces"])
    steps = []
    for i, piece in enumerate(run["t"]):
        step: dict[str, Any] = {"text": pieces[piece][1], "fired": i in run["f"], "flip": i in run["x"]}
        step |= {name: values[i] for name, values in run["m"].items()}
        if str(i) in run["g"]:
            step["greedy_text"] = pieces[run["g"][str(i)]][1]
        if str(i) in run["c"]:
            texts, slm, llm, marks, taken = run["c"][str(i)]
            step["candidates"] = [pieces[text][1] for text in texts], slm, llm, marks, taken
        steps.append(step)
    return steps


def test_packed_runs_say_what_the_traces_said(tmp_path: Path) -> None:
    traces = make_traces() * 20  # more than one block of problems
    for number, trace in enumerate(traces):
        traces[number] = trace | {"problem_id": f"p{number // 3}"}
    write_run(tmp_path, "eval", {"traces.jsonl": traces})
    data = load_traces(tmp_path / "traces.jsonl", {})
    assert data is not None and len(data.index["ids"]) == 60
    for number, trace in enumerate(traces):
        strategy, problem = trace["strategy"], number // 3
        name = {"s2t": "divergence", "s2t-local": "criticality"}.get(strategy)
        scores = data.index["scores"][data.index["strategies"].index(strategy)]
        assert scores["flips"][problem] == sum(step.get("flip", False) for step in trace["steps"])
        assert (scores["correct"][problem], scores["answer"][problem]) == (trace["is_correct"], trace["extracted"])
        for step, packed in zip(trace["steps"], read_back(data, strategy, problem), strict=True):
            assert packed["text"] == step["text"] and packed.get("greedy_text") == step.get("greedy_text")
            assert packed["fired"] == step.get("fired", False) and packed["flip"] == step.get("flip", False)
            if name is not None:
                assert packed[name] == pytest.approx(1000 * step["value"], abs=0.5)
            offered = step.get("candidates", [])
            texts, slm, llm, marks, taken = packed.get("candidates", ([], 0, 0, 0, -1))
            assert texts == [candidate["text"] for candidate in offered]
            if offered:
                assert slm == pytest.approx([1e6 * candidate["slm_prob"] for candidate in offered], abs=0.5)
                assert (llm != 0) == (strategy == "s2t") and (marks != 0) == (strategy == "s2t-local")
                assert offered[taken]["selected"]


def test_traces_of_the_first_release_are_read(tmp_path: Path) -> None:
    """They name every field of every step, and carry candidates where nothing fired."""
    candidate = {"id": 3, "text": " a", "slm_prob": 0.5, "llm_prob": None, "score": None, "selected": True}
    step = {"token_id": 3, "text": " a", "greedy_id": 3, "greedy_text": " a", "fired": False, "value": None}
    step |= {"flip": False, "candidates": [candidate]}
    write_run(tmp_path, "eval", {"traces.jsonl": [make_traces()[0] | {"steps": [step]}]})
    data = load_traces(tmp_path / "traces.jsonl", {})
    assert data is not None and data.index["measures"] == {}
    [read] = read_back(data, "greedy", 0)
    assert read == {"text": " a", "fired": False, "flip": False, "candidates": ([" a"], [500000], 0, 0, 0)}


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_two_thousand_problems_stays_small(tmp_path: Path) -> None:
    """A twentieth of 2,000 problems of 300 tokens under two strategies takes less than a twentieth of 50 MB."""
    draw = random.Random(0)
    vocabulary = [f" {draw.randrange(16**6):x}" for _ in range(5000)]
    traces = [random_trace(draw, vocabulary, name, i) for name in ("greedy", "s2t-local") for i in range(100)]
    run = write_run(tmp_path, "eval", {"summary.json": make_summary(("greedy",)), "traces.jsonl": traces})
    size = write_report(run).stat().st_size
    assert 100_000 < size < 2_500_000


def random_trace(draw: random.Random, vocabulary: list[str], strategy: str, problem: int) -> dict[str, Any]:
    """300 tokens with nothing in them to compress but that some words are frequent; 5 % triggered."""
    steps = []
    for _ in range(300):
        ids = [int(len(vocabulary) * draw.random() ** 3) for _ in range(8)]
        step: dict[str, Any] = {"token_id": ids[0], "text": vocabulary[ids[0]], "divergence": draw.random() ** 4}
        if strategy != "greedy":
            step["value"] = draw.random() ** 4
        if draw.random() < 0.05:
            offered = [{"id": i, "text": vocabulary[i], "selected": i == ids[0]} for i in ids]
            for candidate in offered:
                candidate |= {"slm_prob": draw.random(), "llm_prob": draw.random(), "score": draw.random()}
            step |= {"fired": True, "candidates": offered}
        steps.append(step)
    words = "".join(draw.choices(vocabulary, k=40))
    trace = {"problem_id": f"p{problem}", "question": words, "gold": "1", "strategy": strategy, "steps": steps}
    return trace | {"is_correct": draw.random() < 0.5, "extracted": "1", "prompt_text": words}


@pytest.mark.parametrize("absent", ["manifest.json", "summary.json"])
def test_missing_file_is_one_clear_error(run: Path, absent: str) -> None:
    (run / absent).unlink()
    with pytest.raises(DataError, match=absent) as caught:
        write_report(run)
    assert "\n" not in str(caught.value) and "s2t eval" in str(caught.value)


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "eval", {"summary.json": make_summary()}, status="running")
    with pytest.raises(DataError, match="unfinished"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("no_pictures")
def test_malformed_summary_and_trace_name_what_is_wrong(run: Path) -> None:
    lines = [{key: value for key, value in trace.items() if key != "gold"} for trace in make_traces()]
    write_run(run, "eval", {"traces.jsonl": lines})
    with pytest.raises(DataError, match=r"traces\.jsonl:1 .*gold"):
        write_report(run)
    write_run(run, "eval", {"traces.jsonl": [], "summary.json": {"task": "x", "strategies": {}}})
    with pytest.raises(DataError, match="summary"):
        write_report(run)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_names_the_install_command(run: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*s2t\[plots\]"):
        write_report(run)
