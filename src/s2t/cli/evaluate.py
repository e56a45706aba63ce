"""`s2t eval`: strategies on the same problems, graded, with intervals, paired tests and their cost.

One table of 80 columns says what came out; `--all` prints every other one, too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.output import p_value, percent, percent_interval, print_facts, print_table, short
from s2t.config import EvalConfig
from s2t.workflows import WORKFLOWS

BRIEF = ("strategy", "accuracy %", "95 % interval", "against greedy", "tokens", "forwards SLM+LLM", "seconds")
_AGAINST = BRIEF.index("against greedy")
_LEVEL = 0.05
COLUMNS = ("strategy", "n", "accuracy %", "95 % interval", "triggered %", "flips %", "seconds")
COSTS = ("strategy", "SLM tokens", "LLM tokens", "SLM forwards", "LLM forwards", "SLM TFLOPs", "LLM TFLOPs")
PAIRED = ("", "points", "95 % interval", "p", "p (Holm)", "wins", "losses", "least found")
BY_TEMPLATE = "95 % by template"
PARTS = {
    "seen_templates": "Templates seen in training",
    "unseen_templates": "Templates never seen in training",
}


def print_brief(summary: Mapping[str, Any], rest: str) -> None:
    """One table of summary.json, with the templates seen and not seen in training below where there are such, and one line:
    what a star means, and `rest`, where everything else is."""
    parts = [("", summary), *_parts(summary)]
    has_greedy = "greedy" in summary.get("strategies", {})
    rows: list[tuple[Any, ...]] = []
    for title, part in parts:
        rows += [(title,)] if title else []
        rows += [_brief_row(name, scores, part) for name, scores in part.get("strategies", {}).items()]
    kept = [i for i in range(len(BRIEF)) if has_greedy or i != _AGAINST]
    wanted = [tuple(row[i] for i in kept) if row[1:] else row for row in rows]
    print_table(_title(summary), [BRIEF[i] for i in kept], wanted, gap=1)
    stars = any(str(row[_AGAINST]).endswith("*") for row in rows if row[1:])
    print(f"{f'* p < {_LEVEL:.2f} (Holm). ' if stars else ''}{rest}")
    _warn(summary)


def _title(summary: Mapping[str, Any]) -> str:
    count, split = summary.get("num_test"), summary.get("split", "")
    problems = f": {count:,} {split} problems".replace("  ", " ") if count is not None else ""
    return f"{summary.get('task', '')}{problems}, seed {summary.get('seed')}"


def _parts(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The sections of templates that there are."""
    named = (("seen templates", "seen_templates"), ("unseen templates", "unseen_templates"))
    found = [(title, summary.get(name)) for title, name in named]
    return [(title, part) for title, part in found if part and part.get("strategies")]


def _brief_row(name: str, scores: Mapping[str, Any], part: Mapping[str, Any]) -> tuple[Any, ...]:
    forwards = [scores.get("slm_forwards"), scores.get("llm_forwards")]
    tokens = [scores.get("slm_tokens") or 0, scores.get("llm_tokens") or 0]
    seconds = scores.get("seconds")
    return (
        name,
        percent(scores.get("accuracy")),
        percent_interval(scores.get("ci95")),
        _against_greedy(name, part),
        short(max(tokens)),  # written tokens: of strategies that read an LLM, both models write the same ones
        "+".join(short(count) for count in forwards) if forwards[1] else short(forwards[0]),
        "–" if seconds is None else f"{seconds:.1f}" if seconds < 100 else short(seconds),
    )


def _against_greedy(name: str, part: Mapping[str, Any]) -> str:
    """Points over greedy; with a star where p after Holm's correction is below 0.05."""
    test = (part.get("paired") or {}).get(f"{name} vs greedy")
    if test is None:
        return "–"
    points = f"{100 * test['difference']:+.1f}"
    p = test.get("p_holm")
    return f"{'0.0' if float(points) == 0 else points}{'*' if p is not None and p < _LEVEL else ''}"


def print_all(summary: Mapping[str, Any]) -> None:
    """The tables of summary.json: all problems first, then by whether the template was trained on."""
    task, seed = summary.get("task", ""), summary.get("seed")
    _print_part(f"{task} (seed {seed})", summary, with_costs=True)
    for name, title in PARTS.items():
        part = summary.get(name)
        if part and part.get("strategies"):
            _print_part(f"{title}{_count_of_templates(part)}", part)
    if summary.get("gap_closed") is not None:
        print_facts("s2t-local", {"share of the greedy to s2t gap closed, %": percent(summary["gap_closed"])})
    _warn(summary)


def show(summary: Mapping[str, Any], config: EvalConfig, everything: bool) -> None:
    if everything:
        print_all(summary)
    else:
        print_brief(summary, f"All tables: --all; pictures and traces: s2t report --run {config.out}")


@with_options(EvalConfig, show)
def command(
    config: EvalConfig,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every table: costs, triggers, all paired tests, templates.")
    ] = False,
) -> Any:
    """Grade strategies on the same problems: accuracy, intervals, paired tests, cost."""
    return WORKFLOWS["eval"].start(config)


def _print_part(title: str, part: Mapping[str, Any], with_costs: bool = False) -> None:
    strategies = part.get("strategies", {})
    print_table(title, COLUMNS, [_strategy_row(name, scores) for name, scores in strategies.items()])
    if with_costs:
        print_table("Cost, prompts included", COSTS, [_cost_row(name, scores) for name, scores in strategies.items()])
    if paired := part.get("paired"):
        columns, rows = PAIRED, [_paired_row(name, test) for name, test in paired.items()]
        if any("ci95_by_template" in test for test in paired.values()):
            columns = (*columns[:3], BY_TEMPLATE, *columns[3:])
            by_template = [percent_interval(test.get("ci95_by_template")) for test in paired.values()]
            rows = [(*row[:3], interval, *row[3:]) for row, interval in zip(rows, by_template, strict=True)]
        print_table(
            "Differences on the same problems (least found: what this many problems show 4 times in 5)", columns, rows
        )


def _count_of_templates(part: Mapping[str, Any]) -> str:
    return f" ({part['num_templates']})" if "num_templates" in part else ""


def _strategy_row(name: str, scores: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        name,
        scores.get("num_problems"),
        percent(scores.get("accuracy")),
        percent_interval(scores.get("ci95")),
        percent(scores.get("trigger_rate")),
        percent(scores.get("flip_rate")),
        scores.get("seconds"),
    )


def _cost_row(name: str, scores: Mapping[str, Any]) -> tuple[Any, ...]:
    counts = (scores.get(key) for key in ("slm_tokens", "llm_tokens", "slm_forwards", "llm_forwards"))
    return name, *counts, scores.get("slm_flops", 0) / 1e12, scores.get("llm_flops", 0) / 1e12


def _paired_row(name: str, test: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        name.replace(" vs ", "\nvs "),
        percent(test.get("difference")),
        percent_interval(test.get("ci95")),
        p_value(test.get("p_value")),
        p_value(test.get("p_holm")),
        test.get("wins"),
        test.get("losses"),
        percent(test.get("detectable")),
    )


def _warn(summary: Mapping[str, Any]) -> None:
    for name, scores in summary.get("strategies", {}).items():
        if name.startswith("s2t-local") and scores.get("trigger_rate") == 0:
            print(
                f"warning: {name} never triggered, so that it wrote what greedy writes; lower --threshold, or train the adapter "
                "longer or at a higher --learning-rate.",
                file=sys.stderr,
            )
