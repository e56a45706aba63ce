"""`s2t eval`: strategies on the same problems, graded, with intervals, paired tests and their cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import p_value, percent, percent_interval, print_facts, print_table
from s2t.config import EvalConfig

COLUMNS = ("strategy", "n", "accuracy %", "95 % interval", "triggered %", "flips %", "seconds")
COSTS = ("strategy", "SLM tokens", "LLM tokens", "SLM forwards", "LLM forwards", "SLM TFLOPs", "LLM TFLOPs")
PAIRED = ("", "points", "95 % interval", "p", "p (Holm)", "wins", "losses", "least found")
BY_TEMPLATE = "95 % by template"
PARTS = {
    "seen_templates": "Templates seen in training",
    "unseen_templates": "Templates never seen in training",
}


def print_summary(summary: Mapping[str, Any]) -> None:
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


@with_options(EvalConfig, print_summary)
def command(config: EvalConfig) -> Any:
    """Grade strategies on the same problems: accuracy, intervals, paired tests, cost."""
    from s2t.evaluate import evaluate

    return evaluate(config)


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
