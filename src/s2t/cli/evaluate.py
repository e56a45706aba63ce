"""`s2t eval`: strategies on the same problems, graded, with intervals, paired tests and their cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import percent, percent_interval, print_facts, print_table
from s2t.config import EvalConfig

COLUMNS = (
    "strategy",
    "n",
    "accuracy %",
    "95 % interval",
    "SLM tokens",
    "LLM tokens",
    "SLM forwards",
    "LLM forwards",
    "triggered %",
    "flips %",
    "seconds",
)
PARTS = {
    "seen_templates": "Templates seen in training",
    "unseen_templates": "Templates never seen in training",
}


def print_summary(summary: Mapping[str, Any]) -> None:
    """The tables of summary.json: all problems first, then by whether the template was trained on."""
    task, seed = summary.get("task", ""), summary.get("seed")
    _print_part(f"{task} (seed {seed})", summary)
    for name, title in PARTS.items():
        part = summary.get(name)
        if part and part.get("strategies"):
            _print_part(title, part)
    if summary.get("gap_closed") is not None:
        print_facts("s2t-local", {"share of the greedy to s2t gap closed, %": percent(summary["gap_closed"])})


@with_options(EvalConfig, print_summary)
def command(config: EvalConfig) -> Any:
    """Grade strategies on the same problems: accuracy, intervals, paired tests, cost."""
    from s2t.evaluate import evaluate

    return evaluate(config)


def _print_part(title: str, part: Mapping[str, Any]) -> None:
    rows = [_strategy_row(name, scores) for name, scores in part.get("strategies", {}).items()]
    print_table(title, COLUMNS, rows)
    paired = part.get("paired")
    if paired:
        print_table(
            "Paired on the same problems",
            ("", "difference, points", "95 % interval", "p", "p (Holm)", "wins", "losses", "detectable, points"),
            [_paired_row(name, test) for name, test in paired.items()],
        )


def _strategy_row(name: str, scores: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        name,
        scores.get("num_problems"),
        percent(scores.get("accuracy")),
        percent_interval(scores.get("ci95")),
        scores.get("slm_tokens"),
        scores.get("llm_tokens"),
        scores.get("slm_forwards"),
        scores.get("llm_forwards"),
        percent(scores.get("trigger_rate")),
        percent(scores.get("flip_rate")),
        scores.get("seconds"),
    )


def _paired_row(name: str, test: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        name,
        percent(test.get("difference")),
        percent_interval(test.get("ci95")),
        test.get("p_value"),
        test.get("p_holm"),
        test.get("wins"),
        test.get("losses"),
        percent(test.get("detectable")),
    )
