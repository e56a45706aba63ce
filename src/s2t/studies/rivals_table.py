"""The table and the pictures of the study of all methods: one row a method and share, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2t.config import OVER_ANSWERS, needs_of
from s2t.core.stats import bootstrap_interval, holm_p_values, paired_comparison
from s2t.studies.lab import Chart, Findings, Lab, Series

SHOWN_BY_FLOPS = (
    "greedy",
    "s2t-local",
    "llm",
    "speculative",
    "deepconf",
    "zip-rc",
    "s2t@criticality",
    "smart",
    "cascade",
)
SHOWN_BY_SHARE = (
    ("s2t@divergence", "takeover@entropy", "s2t@criticality", "r2r", "takeover@random"),
    ("specreason", "smart", "glimprouter", "cascade", "frugalgpt", "knn-routing"),
)
_COSTS = ("slm_flops", "llm_flops", "slm_forwards", "llm_forwards", "generated")

Rows = list[list[dict[str, Any]]]
"""Results of one method: seed by seed, problem by problem."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A method at one asked-for share (None where it has none)."""

    method: str
    share: float | None
    rows: Rows
    seconds: float | None = None
    label: str | None = None
    """What it is called in the table, where that is not the method."""


def findings(lab: Lab, arms: Sequence[Arm], shares: Sequence[float]) -> Findings:
    """All arms in one table, each against greedy, with pictures by FLOPs and by share of LLM tokens; `shares` as asked for."""
    correct = [np.array([[r["is_correct"] for r in seed] for seed in arm.rows]) for arm in arms]
    greedy = next(right for arm, right in zip(arms, correct, strict=True) if arm.method == "greedy")
    tests = [paired_comparison(right, greedy) for right in correct]
    adjusted = holm_p_values([test["p_value"] for arm, test in zip(arms, tests, strict=True) if arm.method != "greedy"])
    left = iter(adjusted)
    rows, series = [], {}
    for arm, right, test in zip(arms, correct, tests, strict=True):
        is_greedy = arm.method == "greedy"
        compared = (None, None, None) if is_greedy else (test["difference"], test["ci95"], next(left))
        cost, accuracy, interval = _cost(arm), float(right.mean()), list(bootstrap_interval(right))
        flops = (cost["slm_flops"] + cost["llm_flops"]) / 1e9
        per_forward = cost["generated"] / cost["llm_forwards"] if cost["llm_forwards"] else None
        rows.append(
            (
                *(arm.label or arm.method, arm.share, len(arm.rows), cost["share"], accuracy, interval, *compared),
                *(cost["slm_flops"] / 1e9, cost["llm_flops"] / 1e9, per_forward, arm.seconds),
            )
        )
        lines = series.setdefault(arm.method, {kind: Series(arm.method, [], [], []) for kind in ("flops", "share")})
        for line, x in zip(lines.values(), (flops, 100 * cost["share"]), strict=True):
            line.x.append(x)
            line.y.append(accuracy)
            line.ci95.append((interval[0], interval[1]))
    columns = (
        *(
            "method",
            "asked for %",
            "seeds",
            "LLM's tokens %",
            "accuracy %",
            "95 %",
            "over greedy, points %",
            "95 % of it",
        ),
        *("p (Holm)", "SLM GFLOPs", "LLM GFLOPs", "tokens per LLM forward", "seconds"),
    )
    charts = [
        Chart(
            "GFLOPs of both models per problem",
            "accuracy (%)",
            [series[n]["flops"] for n in SHOWN_BY_FLOPS if n in series],
            log_x=True,
        ),
        *(
            Chart("tokens of the LLM (%)", "accuracy (%)", [series[n]["share"] for n in names if n in series])
            for names in SHOWN_BY_SHARE
        ),
    ]
    config = lab.config
    notes = [
        f"{config.limit:,} problems of the {config.split} split, {config.num_seeds} seeds of what draws at random; costs are per "
        f"problem and seed. Thresholds from {config.calibration_limit:,} calibration problems at shares of "
        f"{', '.join(f'{100 * share:g}' for share in shares)} %.",
        f"p: McNemar (sign flips where there are several seeds) against greedy, after Holm's correction for {len(adjusted)} "
        "tests.",
        "LLM's tokens: those at places that fired; whole answers for cascade, frugalgpt and knn-routing. speculative keeps the "
        "best token alone (top-k 1), so that it writes what llm writes; its share is that of rejected drafts.",
    ]
    return Findings("Every method on the same problems", columns, rows, charts, notes)


def _cost(arm: Arm) -> dict[str, float]:
    """Means over problems and seeds, and the share of tokens that the LLM wrote or chose."""
    results = [result for seed in arm.rows for result in seed]
    total = {name: sum(result["cost"][name] for result in results) for name in _COSTS}
    fired = total["generated"] if arm.method == "llm" else sum(result["num_triggered"] for result in results)
    reads_llm = arm.method in OVER_ANSWERS or "llm" in needs_of(arm.method)  # others fire without one
    share = fired / max(total["generated"], 1) if reads_llm else 0.0
    return {name: value / len(results) for name, value in total.items()} | {"share": share}
