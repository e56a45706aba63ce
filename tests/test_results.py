"""Figures of docs/results.md that come from files of docs/results say what the files say."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

from s2t.files import read_json

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(bounds: list[float]) -> str:
    return f"{percent(bounds[0])} to {percent(bounds[1])}"


def test_every_arm_of_the_real_pair_stands_on_the_page_as_in_its_file():
    document = read_json(DOCS / "results" / "real-pair.json")
    assert {"slm", "llm", "weights", "task", "arms", "paired", "sufficiency"} <= document.keys()
    for arm, found in document["arms"].items():
        cells = (str(found["num_problems"]), percent(found["accuracy"]), interval(found["ci95"]))
        assert f"| {' | '.join(cells)} |" in PAGE or f"{cells[1]} % ({cells[2]}, n = {cells[0]})" in PAGE, arm
    for name, pair in document["paired"].items():
        if name.endswith(" vs greedy") and not name.startswith(("svamp", "humaneval")):
            p = "<0.001" if pair["p_value"] < 0.001 else f"{pair['p_value']:.3f}"
            assert f"| {100 * pair['difference']:+.1f} ({interval(pair['ci95'])}) | {p} |" in PAGE, name
    goal = 1.241 * document["arms"]["greedy"]["accuracy"]
    missed = goal - document["arms"]["s2t-local"]["accuracy"]
    assert f"greedy ({percent(goal)} %) with p < 0.01" in PAGE and f"missed**: by {percent(missed)} points" in PAGE


def test_the_readmes_table_is_the_real_pairs():
    arms = read_json(DOCS / "results" / "real-pair.json")["arms"]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for arm in ("greedy", "self-consistency", "kd", "s2t", "llm"):
        assert f"| {percent(arms[arm]['accuracy'])} | {interval(arms[arm]['ci95'])} |" in readme, arm
    local = arms["s2t-local"]
    assert f"| **{percent(local['accuracy'])}** | {interval(local['ci95'])} |" in readme


def test_every_arm_of_the_real_pair_follows_from_its_questions():
    document = read_json(DOCS / "results" / "real-pair.json")
    with open(DOCS / "results" / "real-pair-questions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    marks = {arm: {row["question"]: int(row[arm]) for row in rows if row[arm]} for arm in document["arms"]}
    for arm, found in document["arms"].items():
        assert (len(marks[arm]), sum(marks[arm].values()) / len(marks[arm])) == (
            found["num_problems"],
            found["accuracy"],
        )
    runs = [run["strategies"] for run in read_json(DOCS / "results" / "real-pair-summaries.json").values()]
    said = [one["accuracy"] for strategies in runs for one in strategies.values() if "accuracy" in one]
    assert len(said) >= 17 and {*said} <= {found["accuracy"] for found in document["arms"].values()}
    for name, pair in document["paired"].items():
        left, right = (marks[arm] for arm in name.split(" vs "))
        gains = [left[question] - right[question] for question in left if question in right]
        assert [len(gains), gains.count(1), gains.count(-1)] == [
            pair[key] for key in ("num_problems", "wins", "losses")
        ]


def test_what_the_real_pairs_trainings_say_stands_on_the_page_as_in_its_file():
    trained = read_json(DOCS / "results" / "real-pair.json")["training"]
    [step, stream, paper, on_sft] = (
        trained[f"train{name}"]["held_out"] for name in ("", "-stream", "-paper", "-on-sft")
    )
    own = (stream["adapter"], step["adapter"], step["slm"])
    rates, losses = zip(*((percent(found["agreement"]), f"{found['nll']:.3f}") for found in own), strict=True)
    assert f"{rates[0]} %, where scope `step` has {rates[1]} and the SLM {rates[2]} (NLL {', '.join(losses)})" in PAGE
    assert (
        f"{percent(on_sft['adapter']['agreement'])} against {percent(on_sft['slm']['agreement'])} %, no weight" in PAGE
    )
    assert f"({percent(step['chosen']['agreement'])} against {percent(step['slm']['agreement'])} %" in PAGE
    at, by_itself = percent(paper["adapter"]["agreement"]), percent(paper["slm"]["agreement"])
    assert f"at {at} % of the held-out groups, the SLM's own order at {by_itself}" in PAGE
    assert (on_sft["adapter_weight"], paper["adapter_weight"], step["adapter_weight"]) == (0, 0, 0.75)


def test_what_the_page_says_of_the_earlier_run_is_what_its_file_says():
    arms = read_json(DOCS / "results" / "real-pair-earlier.json")["arms"]
    local = arms["s2t-local"]
    assert f"{percent(local['accuracy'])} % ({interval(local['ci95'])}) on an H100" in PAGE
    drafted = [arms[name] for name in ("s2t", "takeover")]
    rates = [f"{one['llm_forwards'] / one['slm_tokens']:.2f}" for one in drafted]
    values = [percent(one["accuracy"]) for one in drafted]
    assert f"{values[0]} and {values[1]} %, at {rates[0]} and {rates[1]} LLM forwards" in PAGE


def test_local_sufficiency_of_the_real_pair_stands_on_the_page_as_in_its_file():
    found = read_json(DOCS / "results" / "real-pair.json")["sufficiency"]
    assert set(found) == {"gsm8k", "svamp", "humaneval"}
    for task, one in found.items():
        counts = [f"{one[name]:,}" for name in ("num_problems", "num_steps", "num_divergence_points")]
        rates = [f"{percent(one[k])} ({interval(one['ci95'][k])})" for k in ("1", "2", "4", "8", "16")]
        assert f" | {' | '.join(counts + rates)} |" in PAGE, task


def test_the_pair_that_does_not_suit_stands_on_the_page_as_in_its_file():
    found = read_json(DOCS / "results" / "smollm2-measure.json")
    for k in ("1", "8", "16"):
        assert f"hit@{k} {percent(found['hit_rate'][k])} ({interval(found['hit_rate_ci95'][k])})" in PAGE


def test_every_run_of_the_ranking_selector_stands_on_the_page_as_in_its_file():
    for name, run in read_json(DOCS / "results" / "embedded-rank.json")["runs"].items():
        row = " | ".join((name, percent(run["accuracy"]), percent(run["seen"]), percent(run["held_out"])))
        assert f"| {row} | " in PAGE, name


@pytest.mark.parametrize("file", ["packed.json", "packed-real.json"])
def test_what_packing_costs_stands_on_the_laptop_page_as_in_its_file(file):
    page = (DOCS / "laptop.md").read_text(encoding="utf-8")
    for name, found in read_json(DOCS / "results" / file)["precisions"].items():
        greedy, local = found["greedy"], found["s2t-local"]
        low, high = (percent(value) for value in local["difference_ci95"])
        gain = f"{100 * local['difference']:+.1f} ({low} to {high})" if name != "bfloat16" else "–"
        rates = f"{percent(local['trigger_rate'])}, {percent(local['flip_rate'])}"
        row = " | ".join((name, percent(greedy["accuracy"]), percent(local["accuracy"]), gain, rates))
        assert f"| {row} |" in page, row


RIVALS = runpy.run_path(str(DOCS / "make_rivals.py"))


def row(method, share, accuracy, over, p):
    return {
        "method": method,
        "asked for %": share,
        "LLM's tokens %": 0.051,
        "accuracy %": accuracy,
        "95 %": [accuracy - 0.02, accuracy + 0.02],
        "compared with": "s2t@criticality",
        "over ours, points %": over,
        "95 % of that": None if over is None else [over - 0.01, over + 0.01],
        "p (Holm) of ours": p,
        "SLM GFLOPs": 0.09,
        "LLM GFLOPs": 0.16,
        "tokens per LLM forward": 23.0,
        "seconds": 40.0,
    }


RESULT = {
    "rows": [
        row("s2t@criticality", 0.05, 0.85, None, None),
        row("r2r", 0.02, 0.83, 0.16, 0.001),
        row("r2r", 0.05, 0.86, 0.01, 0.4),
        row("smart", 0.05, 0.5, -0.35, 0.001),
        row("zip-rc, 0.001 a token", None, 0.4, None, None),
    ],
    "notes": ["26 problems."],
}


def test_the_page_of_other_methods_says_what_its_file_of_results_says():
    page = (DOCS / "rivals.md").read_text(encoding="utf-8")
    assert RIVALS["page"](page, read_json(DOCS / "results" / "rivals.json")) == page, "run python docs/make_rivals.py"
    for name in ("table:embedded", "wins:embedded", "table:real", "wins:real"):
        assert f"<!-- {name} -->" in page


def test_where_a_rival_wins_that_is_the_headline_of_its_row():
    lines = "<!-- r2r --><!-- / -->|<!-- smart --><!-- / -->|<!-- zip-rc --><!-- / -->"
    r2r, smart, foretold = RIVALS["page"](lines, {"embedded": RESULT}).split("|")
    wins = "**It wins here: `r2r` at 2 % by 16.0 points (15.0 to 17.0) over `s2t@criticality`.** *Found:* 83.0 % (81.0"
    assert r2r.removeprefix("<!-- r2r --> ").startswith(wins)
    assert smart == "<!-- smart --> *Found:* 50.0 % (48.0 to 52.0) at 5 %, the LLM's tokens 5.1 %. <!-- / -->"
    assert "*Found:* 40.0 % (38.0 to 42.0) with 0.001 a token." in foretold
    told = RIVALS["wins"](RESULT)
    assert "Ahead of ours: `r2r` at 2 % by 16.0" in told and "Behind ours: `smart` at 5 % by -35.0" in told
    assert RIVALS["table"](RESULT).count("\n| ") == 7 and "- 26 problems." in RIVALS["table"](RESULT)
