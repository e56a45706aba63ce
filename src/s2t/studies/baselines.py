"""Every strategy on the same problems, prompts and stops: accuracy with intervals, tests, and the cost of both models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.studies.lab import Chart, Findings, Lab, Series

NUM_SAMPLES = 16
STRATEGIES = (
    *("greedy", "s2t-local", "llm"),
    *(f"{name}@{trigger}" for name in ("takeover", "s2t") for trigger in ("divergence", "entropy", "random")),
    *("self-consistency", "self-certainty"),
)
_COSTS = ("slm_tokens", "llm_tokens", "slm_forwards", "llm_forwards")


def baselines(lab: Lab) -> Findings:
    """All strategies; triggers at one calibrated rate, what draws at random under `num_seeds` seeds, curves over N samples."""
    summary = lab.evaluated(
        "eval",
        ",".join(STRATEGIES),
        adapter=str(lab.trained()),
        calibration=str(lab.calibrated()),
        num_seeds=lab.config.num_seeds,
        num_samples=NUM_SAMPLES,
    )
    scores, paired = summary["strategies"], summary["paired"]
    rows = [_row(name, scores[name], paired) for name in STRATEGIES]
    rows.append(_one_sample(scores["self-consistency"], len(rows[0])))
    columns = (
        *(
            "strategy",
            "seeds",
            "accuracy %",
            "95 %",
            "over greedy, points %",
            "95 % of it",
            "p (Holm)",
            "least found, points %",
        ),
        *("triggered %", "SLM tokens", "LLM tokens", "SLM forwards", "LLM forwards", "SLM TFLOPs", "LLM TFLOPs"),
    )
    curves = [
        _curve("majority vote of N", scores["self-consistency"], "accuracy", "ci95"),
        _curve("surest of N (self-certainty)", scores["self-certainty"], "accuracy", "ci95"),
        _curve("pass@N: any of N is right", scores["self-consistency"], "pass_at", "pass_at_ci95"),
        *(_flat(name, scores[name]) for name in ("s2t-local", "greedy", "s2t@divergence")),
    ]
    charts = [
        Chart("N, samples", "accuracy (%)", curves, log_x=True),
        Chart(
            "TFLOPs of both models, prompts included",
            "accuracy (%)",
            [_point(n, scores[n]) for n in STRATEGIES],
            log_x=True,
        ),
    ]
    notes = [
        f"{lab.config.limit:,} problems of the {lab.config.split} split; {lab.config.num_seeds} seeds of what draws at random, "
        f"whose intervals cover problems and seeds and whose costs are those of one seed. N = {NUM_SAMPLES}, temperature 0.7, "
        "top-p 0.95.",
        f"p: exact McNemar (sign flips where there are several seeds) after Holm's correction for the {len(paired)} tests of the "
        "run. Least found: the difference that this many problems would show with 80 % power.",
        *(_against(name, paired) for name in ("self-consistency", "self-certainty")),
        *(f"{one.name}, N = 1 to {NUM_SAMPLES}: {', '.join(f'{100 * y:.1f}' for y in one.y)}." for one in curves[:3]),
    ]
    return Findings("Every strategy on the same problems", columns, rows, charts, notes)


def _row(name: str, found: Mapping[str, Any], paired: Mapping[str, Any]) -> tuple[Any, ...]:
    test = paired.get(f"{name} vs greedy")
    compared = (test["difference"], test["ci95"], test["p_holm"], test["detectable"]) if test else (None,) * 4
    costs = (*(found[key] for key in _COSTS), found["slm_flops"] / 1e12, found["llm_flops"] / 1e12)
    return name, found["num_seeds"], found["accuracy"], found["ci95"], *compared, found["trigger_rate"], *costs


def _one_sample(found: Mapping[str, Any], width: int) -> tuple[Any, ...]:
    """Sampling once: the mean over all N samples of all seeds, which is pass@1."""
    one, share = found["by_num_samples"]["1"], 1 / found["num_samples"]
    known = ("sample (the N taken singly)", found["num_seeds"], one["pass_at"], one["pass_at_ci95"])
    costs = (0.0, round(found["slm_tokens"] * share), 0)
    return (*known, *(None,) * 4, *costs, *(None,) * (width - len(known) - 4 - len(costs)))


def _curve(name: str, found: Mapping[str, Any], value: str, interval: str) -> Series:
    by_n = found["by_num_samples"]
    return Series(
        name,
        [float(n) for n in by_n],
        [one[value] for one in by_n.values()],
        [tuple(one[interval]) for one in by_n.values()],
    )


def _flat(name: str, found: Mapping[str, Any]) -> Series:
    return Series(name, [1.0, float(NUM_SAMPLES)], [found["accuracy"]] * 2, [tuple(found["ci95"])] * 2)


def _point(name: str, found: Mapping[str, Any]) -> Series:
    cost = (found["slm_flops"] + found["llm_flops"]) / 1e12
    return Series(name, [cost], [found["accuracy"]], [tuple(found["ci95"])])


def _against(name: str, paired: Mapping[str, Any]) -> str:
    test = paired[f"s2t-local vs {name}"]
    low, high = test["ci95"]
    p = test["p_holm"]
    return (
        f"s2t-local over {name}: {100 * test['difference']:.1f} points ({100 * low:.1f} to {100 * high:.1f}), "
        f"p {'< 0.001' if p < 0.0005 else f'= {p:.3f}'} (Holm)."
    )
