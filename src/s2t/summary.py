"""Graded results to summary.json: accuracy with intervals, paired tests on the same problems, and every cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from s2t.config import NEEDS_LLM, OVER_ANSWERS, EvalConfig
from s2t.core.stats import (
    bootstrap_interval,
    clustered_difference_interval,
    holm_p_values,
    paired_comparison,
    pass_at,
)
from s2t.methods.sample import choose_sample
from s2t.model.adapter import AdapterConfig
from s2t.model.lora import distilled_from
from s2t.model.metadata import is_same_source
from s2t.records import Problem
from s2t.tasks.problems import Task, heldout_templates

Rows = list[list[dict[str, Any]]]
"""Results of one strategy: seed by seed, problem by problem."""
Run = tuple[list[dict[str, Any]], float]
"""Results and seconds of one strategy under one seed."""
_CURVE_RESAMPLES = 2000
_COSTS = ("slm_forwards", "llm_forwards", "slm_processed", "llm_processed", "slm_flops", "llm_flops")


def summarize(
    config: EvalConfig,
    task: Task,
    problems: Sequence[Problem],
    results: Mapping[str, list[Run]],
    adapter: AdapterConfig | None,
    pair: Mapping[str, Any],
    server: Mapping[str, Any],
) -> dict[str, Any]:
    """summary.json of an evaluation: every strategy's scores, paired tests, and the same over seen and unseen templates.

    `results` holds the strategies' results and seconds, seed by seed; `server` what asking servers took, if any were.
    """
    rows = {name: [found[0] for found in seeds] for name, seeds in results.items()}
    seconds = {name: sum(found[1] for found in seeds) / len(seeds) for name, seeds in results.items()}
    held = _heldout(config, task, adapter)
    summary = {
        "task": config.task,
        "split": config.split,
        "seed": config.seed,
        "num_test": len(problems),
        "pair": pair,
        "sufficiency": None,
        **_section(rows, seconds, config.seed),
        "gap_closed": _gap_closed(rows),
        **server,
    }
    for title, is_held in (("seen_templates", False), ("unseen_templates", True)):
        part = {
            name: [[r for r in found if _is_of(r["template"], held, is_held)] for found in seeds]
            for name, seeds in rows.items()
        }
        if held and all(seeds[0] for seeds in part.values()):
            count = len(next(iter(part.values()))[0])
            summary[title] = {
                "num_problems": count,
                **_by_template(part, _section(part, None, config.seed), config.seed),
                "gap_closed": _gap_closed(part),
            }
    return summary


def _is_of(template: str | None, held: set[str], is_held: bool) -> bool:
    """Whether a problem belongs to the held-out templates, or to the others; one without a template belongs to neither."""
    return template is not None and (template in held) == is_held


def _heldout(config: EvalConfig, task: Task, adapter: AdapterConfig | None) -> set[str]:
    """The task's templates that neither the selector nor the distillation of the SLM has seen; where there is neither, the
    setting's. Empty, too, where they were trained on other tasks, whose templates say nothing about this one."""
    own = set(task.templates())
    distilled = distilled_from(config.slm)
    if adapter is None and distilled is None:
        return set(heldout_templates(own, config.heldout_templates))
    lists = []
    if adapter is not None and adapter.was_trained_on(config.task):
        lists.append(set(adapter.heldout_of(config.task)))
    if distilled is not None and is_same_source(distilled["task"], config.task):
        lists.append(set(distilled["heldout_templates"]))
    return set.intersection(*lists) if own and lists else set()


def _section(rows: Mapping[str, Rows], seconds: Mapping[str, float] | None, seed: int) -> dict[str, Any]:
    strategies = {name: _scores(found, None if seconds is None else seconds[name]) for name, found in rows.items()}
    correct = {name: _correct(seeds) for name, seeds in rows.items()}
    pairs = _pairs(tuple(rows))
    tests = [paired_comparison(correct[left], correct[right], seed=seed) for left, right in pairs]
    adjusted = holm_p_values([test["p_value"] for test in tests])
    paired = {
        f"{left} vs {right}": test | {"p_holm": p}
        for (left, right), test, p in zip(pairs, tests, adjusted, strict=True)
    }
    return {"strategies": strategies, "paired": paired}


def _by_template(rows: Mapping[str, Rows], section: dict[str, Any], seed: int) -> dict[str, Any]:
    """A section with intervals that resample whole templates: whether a rule carries over is a fact of a template."""
    templates = [r["template"] for r in next(iter(rows.values()))[0]]
    section["num_templates"] = len(set(templates))
    for pair, test in section["paired"].items():
        left, right = (_correct(rows[name]).mean(0) for name in pair.split(" vs "))
        test["ci95_by_template"] = list(clustered_difference_interval(left - right, templates, seed=seed))
    return section


def _correct(seeds: Rows) -> np.ndarray:
    return np.array([[r["is_correct"] for r in found] for found in seeds])  # [S, N]


def _pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """s2t-local against every other strategy, and every other strategy against greedy."""
    pairs = [("s2t-local", name) for name in names if name != "s2t-local"] if "s2t-local" in names else []
    if "greedy" in names:
        pairs += [(name, "greedy") for name in names if name not in ("greedy", "s2t-local")]
    if "s2t" in names:
        pairs += [("s2t", name) for name in names if name.startswith(("takeover", "s2t@"))]
    return pairs


def _scores(seeds: Rows, seconds: float | None) -> dict[str, Any]:
    """Accuracy with its interval, and costs per seed."""
    correct, results, share = _correct(seeds), [r for found in seeds for r in found], 1 / len(seeds)
    generated = sum(r["cost"]["generated"] for r in results)
    base = results[0]["strategy"].partition("@")[0]
    handed_over = sum(r["num_triggered"] for r in results) if base in OVER_ANSWERS else 0  # whole answers of the LLM
    scores = {
        "accuracy": float(correct.mean()),
        "ci95": list(bootstrap_interval(correct)),
        "num_problems": len(seeds[0]),
        "num_seeds": len(seeds),
        "accuracy_by_seed": correct.mean(axis=1).tolist(),
        "slm_tokens": 0 if base == "llm" else round((generated - handed_over) * share),
        "llm_tokens": round((generated if base in NEEDS_LLM else handed_over) * share),
        **{key: round(sum(r["cost"][key] for r in results) * share) for key in _COSTS},
        "trigger_rate": sum(r["num_triggered"] for r in results) / max(generated, 1),
        "flip_rate": sum(r["num_flips"] for r in results) / max(generated, 1),
        "seconds": seconds,
    }
    if results[0]["samples"] is not None:
        scores["num_samples"] = results[0]["num_samples"]
        scores["pass_at_n"] = float(np.mean([r["num_correct_samples"] > 0 for r in results]))
        scores["by_num_samples"] = _by_num_samples(base, seeds)
    return scores


def _by_num_samples(strategy: str, seeds: Rows) -> dict[str, dict[str, Any]]:
    """What the first n of the N samples would have answered, for every n, with intervals over problems and seeds.

    `pass_at` is the unbiased estimate from all N.
    """
    total = seeds[0][0]["num_samples"]
    curves: dict[str, dict[str, Any]] = {}
    for n in range(1, total + 1):
        right = np.array([[_first_right(strategy, result["samples"][:n]) for result in found] for found in seeds])
        passed = np.array([[pass_at(total, result["num_correct_samples"], n) for result in found] for found in seeds])
        curves[str(n)] = {
            "accuracy": float(right.mean()),
            "ci95": list(bootstrap_interval(right, num_resamples=_CURVE_RESAMPLES)),
            "pass_at": float(passed.mean()),
            "pass_at_ci95": list(bootstrap_interval(passed, num_resamples=_CURVE_RESAMPLES)),
        }
    return curves


def _first_right(strategy: str, samples: Sequence[Mapping[str, Any]]) -> bool:
    winner = choose_sample(strategy, [s["answer"] for s in samples], [s["certainty"] for s in samples])
    return bool(samples[winner]["is_correct"])


def _gap_closed(rows: Mapping[str, Rows]) -> float | None:
    """Share of the way from greedy to collaborative S2T that s2t-local goes; None where it is not defined."""
    if not {"greedy", "s2t", "s2t-local"} <= rows.keys():
        return None
    accuracy = {name: float(_correct(rows[name]).mean()) for name in ("greedy", "s2t", "s2t-local")}
    gap = accuracy["s2t"] - accuracy["greedy"]
    return (accuracy["s2t-local"] - accuracy["greedy"]) / gap if gap > 0 else None
