"""Figures of docs/results.md that come from files of docs/results say what the files say."""

from __future__ import annotations

from pathlib import Path

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
    for name in ("self-consistency vs greedy", "s2t-local vs greedy", "llm vs greedy"):
        pair = document["paired"][name]
        assert f"| {100 * pair['difference']:+.1f} ({interval(pair['ci95'])}) |" in PAGE, name


def test_local_sufficiency_of_the_real_pair_stands_on_the_page_as_in_its_file():
    [(task, found)] = read_json(DOCS / "results" / "real-pair.json")["sufficiency"].items()
    ks = ("1", "2", "4", "8", "16")
    assert task == "gsm8k" and f"{found['num_divergence_points']:,}" in PAGE and f"{found['num_steps']:,}" in PAGE
    assert f"| % | {' | '.join(percent(found[k]) for k in ks)} |" in PAGE
    assert f"| 95 % | {' | '.join(interval(found['ci95'][k]) for k in ks)} |" in PAGE


def test_every_run_of_the_ranking_selector_stands_on_the_page_as_in_its_file():
    for name, run in read_json(DOCS / "results" / "embedded-rank.json")["runs"].items():
        row = " | ".join((name, percent(run["accuracy"]), percent(run["seen"]), percent(run["held_out"])))
        assert f"| {row} | " in PAGE, name


def test_what_packing_costs_stands_on_the_laptop_page_as_in_its_file():
    page = (DOCS / "laptop.md").read_text(encoding="utf-8")
    for name, found in read_json(DOCS / "results" / "packed.json")["precisions"].items():
        greedy, local = found["greedy"], found["s2t-local"]
        low, high = (percent(value) for value in local["difference_ci95"])
        gain = f"{100 * local['difference']:+.1f} ({low} to {high})" if name != "bfloat16" else "–"
        rates = f"{percent(local['trigger_rate'])}, {percent(local['flip_rate'])}"
        row = " | ".join((name, percent(greedy["accuracy"]), percent(local["accuracy"]), gain, rates))
        assert f"| {row} |" in page, row
