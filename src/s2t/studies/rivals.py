"""Every method in one table: accuracy against cost, at matched shares of LLM tokens, on the same problems and prompts.

Thresholds come from the calibration split alone: there each method's readings along the SLM's own answers say where it would hand
a given share of the tokens to the LLM. The share that came of it on the test problems stands beside the one that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2t.combine import combine, known_answers
from s2t.config import EvalConfig, build_config, needs_of
from s2t.core.stats import bootstrap_interval, holm_p_values, paired_comparison
from s2t.decode.opening import open_pair
from s2t.decode.workload import open_task, requests_for
from s2t.files import iter_jsonl, read_json, write_json
from s2t.methods.answers import FrugalGPT, NearestNeighbours
from s2t.methods.strategies import build_strategy
from s2t.records import Problem
from s2t.studies.lab import Chart, Findings, Lab, Series

SHARES = (0.02, 0.05, 0.1, 0.2)
NUM_SAMPLES = 8
PLAIN = (
    *("greedy", "s2t-local", "llm", "confidence", "sample", "self-consistency", "self-certainty", "borda", "deepconf"),
    *("contrastive", "context-aware", "dola", "multiplex"),
)
BY_TOKEN = tuple(f"{name}@{kind}" for name in ("takeover", "s2t") for kind in ("divergence", "entropy", "random"))
BY_STEP = ("specreason", "smart", "glimprouter")
OVER_ANSWERS = ("cascade", "frugalgpt", "knn-routing")
READINGS = ("divergence", "entropy", "criticality", "router", "step-score", "step-confidence", "step-entropy")
SHOWN_BY_FLOPS = ("greedy", "s2t-local", "llm", "speculative", "deepconf", "s2t@criticality", "smart", "cascade")
SHOWN_BY_SHARE = (
    ("s2t@divergence", "takeover@entropy", "s2t@criticality", "r2r", "takeover@random"),
    ("specreason", "smart", "glimprouter", "cascade", "frugalgpt", "knn-routing"),
)
_BELOW = ("step-score", "step-confidence", "confidence", "frugalgpt")  # these fire below their threshold
_COSTS = ("slm_flops", "llm_flops", "slm_forwards", "llm_forwards", "generated")

Rows = list[list[dict[str, Any]]]
"""Results of one method: seed by seed, problem by problem."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """A method at one asked-for share (None where it has none)."""

    method: str
    share: float | None
    rows: Rows
    seconds: float | None = None


def rivals(lab: Lab) -> Findings:
    """Every method beside ours on the same problems: accuracy against FLOPs and LLM tokens, at shares of 2, 5, 10 and 20 %."""
    adapter, router = str(lab.trained()), str(lab.routed() / "router")
    drawn = {"num_seeds": lab.config.num_seeds, "num_samples": NUM_SAMPLES, "adapter": adapter, "router": router}
    arms = _of(lab, "plain", PLAIN, None, **drawn)
    arms += _of(lab, "speculative", ("speculative",), None, top_k=1)
    known = lab.folder / "known"
    lab.evaluated("known", "confidence,llm", split="calibration", limit=lab.config.calibration_limit)
    readings = _readings(lab, adapter, router)
    plain = {arm.method: arm for arm in arms}
    for share in SHARES:
        thresholds = {name: threshold_for(name, values, share) for name, values in readings.items()} | {"random": share}
        name = f"share-{share:g}"
        calibration = str(lab.thresholds_file(name, thresholds))
        names = (*BY_TOKEN, "r2r", *BY_STEP)
        arms += _of(lab, name, names, share, **drawn, calibration=calibration)
        trained = ("takeover@criticality", "s2t@criticality")
        arms += _of(lab, f"{name}-trained", trained, share, adapter=adapter, threshold=thresholds["criticality"])
        arms += _over_answers(lab, share, plain, known)
    return _findings(lab, arms)


def threshold_for(name: str, values: Sequence[float], share: float) -> float:
    """The threshold at which a reading fires nearest to such a share of the tokens; readings that tie cannot be parted."""
    found, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    margin = 1e-6 + 1e-3 * np.abs(found[[0, -1]])
    passed = np.cumsum(counts) / len(values)  # at or below each reading
    if name in _BELOW:
        cuts, rates = np.r_[found, found[-1] + margin[1]], np.r_[0.0, passed]
    else:
        cuts, rates = np.r_[found[0] - margin[0], found], np.r_[1.0, 1 - passed]
    return float(cuts[np.abs(rates - share).argmin()])


def _of(lab: Lab, folder: str, names: Sequence[str], share: float | None, **settings: Any) -> list[_Arm]:
    """Arms of one evaluation, in a folder of its own."""
    found = lab.evaluated(folder, ",".join(names), **settings)["strategies"]
    by_name: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for _, result in iter_jsonl(lab.folder / folder / "results.jsonl"):
        by_name.setdefault(result["strategy"], {}).setdefault(result["seed"], []).append(result)
    arms = []
    for name in names:
        arms.append(_Arm(name, share, list(by_name[name].values()), found[name]["seconds"]))
    return arms


def _over_answers(lab: Lab, share: float, plain: Mapping[str, _Arm], known: Path) -> list[_Arm]:
    """Cascades and routing over the answers that are there, at thresholds from the calibration split."""
    config = build_config(EvalConfig, flags=lab.settings({"known": str(known), "limit": lab.config.limit}))
    task = open_task(config, config.slm, config.revision)
    problems = task.problems(lab.config.split, lab.config.limit, lab.config.seed)
    results = {name: [(rows, 0.0) for rows in plain[name].rows] for name in ("confidence", "llm")}
    values = _known_values(config, problems)
    arms = []
    for name in OVER_ANSWERS:
        at = threshold_for("confidence" if name == "cascade" else name, values[name], share)
        own = build_config(EvalConfig, flags=lab.settings({"known": str(known), "threshold": at}))
        arms.append(_Arm(name, share, [run[0] for run in combine(name, own, task, problems, results)]))
    return arms


def _known_values(config: EvalConfig, problems: Sequence[Problem]) -> dict[str, list[float]]:
    """What decides in each method over answers, on the calibration problems that it learns from."""
    pool = known_answers(config, problems)
    scorer, neighbours = FrugalGPT(config, {}, pool), NearestNeighbours(config, {}, pool)
    return {
        "cascade": [one["confidence"]["value"] for one in pool.answers],
        "frugalgpt": [scorer.score(one["confidence"]) for one in pool.answers],
        "knn-routing": [neighbours.gain(question) for question in pool.questions],
    }


def _readings(lab: Lab, adapter: str, router: str) -> dict[str, list[float]]:
    """What every trigger reads at each token past its warm-up of the SLM's calibration answers; read once and kept."""
    path = lab.folder / "readings.json"
    if not path.is_file():
        write_json(path, _read(lab, adapter, router))
    return read_json(path)


def _read(lab: Lab, adapter: str, router: str) -> dict[str, list[float]]:
    flags = lab.settings({"adapter": adapter, "router": router, "strategies": "takeover", "split": "calibration"})
    config = build_config(EvalConfig, flags=flags)
    pair = open_pair(config, ["takeover@divergence", "takeover@criticality"])
    task = open_task(config, config.slm, config.revision)
    requests = requests_for(pair, task, task.problems("calibration", lab.config.calibration_limit, config.seed))
    found = {}
    for name in READINGS:
        never = -math.inf if name in _BELOW else math.inf
        own = build_config(EvalConfig, flags=flags | {"trigger": name, "threshold": never})
        strategy = build_strategy("takeover", own, {})
        done = pair.write(strategy, requests, config.max_new_tokens, keep_steps=True, trace=False)
        found[name] = [
            v for s in done for v in _filled([step.value or 0.0 for step in s.steps])[strategy.warmup_steps :]
        ]
    return found


def _filled(values: Sequence[float]) -> list[float]:
    """Readings of a step's first token hold for all of its tokens; -1 says that a token begins none."""
    filled: list[float] = []
    for value in values:
        filled.append(filled[-1] if value == -1.0 and filled else value)
    return filled


def _findings(lab: Lab, arms: Sequence[_Arm]) -> Findings:
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
                *(arm.method, arm.share, len(arm.rows), cost["share"], accuracy, interval, *compared),
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
            [series[n]["flops"] for n in SHOWN_BY_FLOPS],
            log_x=True,
        ),
        *(
            Chart("tokens of the LLM (%)", "accuracy (%)", [series[n]["share"] for n in names])
            for names in SHOWN_BY_SHARE
        ),
    ]
    config = lab.config
    notes = [
        f"{config.limit:,} problems of the {config.split} split, {config.num_seeds} seeds of what draws at random; costs are per "
        f"problem and seed. Thresholds from {config.calibration_limit:,} calibration problems at shares of "
        f"{', '.join(f'{100 * share:g}' for share in SHARES)} %.",
        f"p: McNemar (sign flips where there are several seeds) against greedy, after Holm's correction for {len(adjusted)} "
        "tests.",
        "LLM's tokens: those at places that fired; whole answers for cascade, frugalgpt and knn-routing. speculative keeps the "
        "best token alone (top-k 1), so that it writes what llm writes; its share is that of rejected drafts.",
    ]
    return Findings("Every method on the same problems", columns, rows, charts, notes)


def _cost(arm: _Arm) -> dict[str, float]:
    """Means over problems and seeds, and the share of tokens that the LLM wrote or chose."""
    results = [result for seed in arm.rows for result in seed]
    total = {name: sum(result["cost"][name] for result in results) for name in _COSTS}
    fired = total["generated"] if arm.method == "llm" else sum(result["num_triggered"] for result in results)
    reads_llm = arm.method in OVER_ANSWERS or "llm" in needs_of(arm.method)  # others fire without one
    share = fired / max(total["generated"], 1) if reads_llm else 0.0
    return {name: value / len(results) for name, value in total.items()} | {"share": share}
