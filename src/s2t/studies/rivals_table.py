"""The table and the pictures of the study of all methods: one row a method and share, tested against greedy and against ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
OURS_WITH_LLM, OURS_ALONE = "s2t@criticality", "s2t-local"
COLUMNS = (
    *("method", "asked for %", "seeds", "LLM's tokens %", "accuracy %", "95 %"),
    *(
        "over greedy, points %",
        "95 % of it",
        "p (Holm)",
        "compared with",
        "over ours, points %",
        "95 % of that",
        "p (Holm) of ours",
    ),
    *("SLM GFLOPs", "LLM GFLOPs", "tokens per LLM forward", "seconds"),
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

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer is right; [seeds, problems]."""
        return np.array([[result["is_correct"] for result in seed] for seed in self.rows])


def findings(lab: Lab, arms: Sequence[Arm], shares: Sequence[float]) -> Findings:
    """All arms in one table, with pictures by FLOPs and by share of LLM tokens; `shares` as asked for."""
    [greedy] = [arm for arm in arms if arm.method == "greedy"]
    over_greedy = _compared(arms, {i: greedy for i, arm in enumerate(arms) if arm is not greedy})
    ours = {i: own for i, arm in enumerate(arms) if (own := _ours(arm, arms)) is not None}
    over_ours = _compared(arms, ours)
    rows: list[tuple[Any, ...]] = []
    series: dict[str, tuple[Series, Series]] = {}
    for place, arm in enumerate(arms):
        cost, right = _cost(arm), arm.right
        accuracy, interval = float(right.mean()), list(bootstrap_interval(right))
        own = ours.get(place)
        per_forward = cost["generated"] / cost["llm_forwards"] if cost["llm_forwards"] else None
        rows.append(
            (
                *(
                    arm.label or arm.method,
                    arm.share,
                    len(arm.rows),
                    cost["share"],
                    accuracy,
                    interval,
                    *over_greedy[place],
                ),
                *(own.method if own is not None else None, *over_ours[place]),
                *(cost["slm_flops"] / 1e9, cost["llm_flops"] / 1e9, per_forward, arm.seconds),
            )
        )
        lines = series.setdefault(arm.method, (Series(arm.method, [], [], []), Series(arm.method, [], [], [])))
        flops = (cost["slm_flops"] + cost["llm_flops"]) / 1e9
        for line, x in zip(lines, (flops, 100 * cost["share"]), strict=True):
            line.x.append(x)
            line.y.append(accuracy)
            line.ci95.append((interval[0], interval[1]))
    return Findings(
        "Every method on the same problems", COLUMNS, rows, _charts(series), _notes(lab, shares, len(arms), len(ours))
    )


def _compared(arms: Sequence[Arm], others: Mapping[int, Arm]) -> list[tuple[Any, Any, Any]]:
    """Difference, interval, and p after Holm of some arms over others; None where there is no other."""
    tests = {i: paired_comparison(arms[i].right, other.right) for i, other in others.items()}
    adjusted = (
        dict(zip(tests, holm_p_values([test["p_value"] for test in tests.values()]), strict=True)) if tests else {}
    )
    none = (None, None, None)
    return [(tests[i]["difference"], tests[i]["ci95"], adjusted[i]) if i in tests else none for i in range(len(arms))]


def _ours(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Which arm of ours another one stands against: selection at the same share, or alone where no LLM is read."""
    reads_llm = _cost(arm)["llm_flops"] > 0
    name = OURS_WITH_LLM if reads_llm else OURS_ALONE
    if arm.method in (name, "llm", "greedy", "confidence") or (reads_llm and arm.share is None):
        return None
    return next((own for own in arms if own.method == name and (not reads_llm or own.share == arm.share)), None)


def _charts(series: Mapping[str, tuple[Series, Series]]) -> list[Chart]:
    by_flops = [series[name][0] for name in SHOWN_BY_FLOPS if name in series]
    by_share = ([series[name][1] for name in names if name in series] for names in SHOWN_BY_SHARE)
    return [
        Chart("GFLOPs of both models per problem", "accuracy (%)", by_flops, log_x=True),
        *(Chart("tokens of the LLM (%)", "accuracy (%)", lines) for lines in by_share),
    ]


def _notes(lab: Lab, shares: Sequence[float], num_arms: int, num_ours: int) -> list[str]:
    config = lab.config
    return [
        f"{config.limit:,} problems of the {config.split} split, {config.num_seeds} seeds of what draws at random; costs are per "
        f"problem and seed. Thresholds from {config.calibration_limit:,} calibration problems at shares of "
        f"{', '.join(f'{100 * share:g}' for share in shares)} %.",
        f"p: McNemar (sign flips where there are several seeds) against greedy, after Holm's correction for {num_arms - 1} "
        f"tests; and against ours, for {num_ours}: {OURS_WITH_LLM} at the same share, {OURS_ALONE} where no LLM is read.",
        "LLM's tokens: those at places that fired; whole answers for cascade, frugalgpt and knn-routing. speculative keeps the "
        "best token alone (top-k 1), so that it writes what llm writes; its share is that of rejected drafts.",
    ]


def _cost(arm: Arm) -> dict[str, float]:
    """Means over problems and seeds, and the share of tokens that the LLM wrote or chose."""
    results = [result for seed in arm.rows for result in seed]
    total = {name: sum(result["cost"][name] for result in results) for name in _COSTS}
    fired = total["generated"] if arm.method == "llm" else sum(result["num_triggered"] for result in results)
    reads_llm = arm.method in OVER_ANSWERS or "llm" in needs_of(arm.method)  # others fire without one
    share = fired / max(total["generated"], 1) if reads_llm else 0.0
    return {name: value / len(results) for name, value in total.items()} | {"share": share}
