"""Studies of the selector's training: ablations of scope, score, loss and labels; how many problems; what carries over."""

from __future__ import annotations

from typing import Any

import numpy as np

from s2t.core.stats import holm_p_values, paired_comparison
from s2t.files import read_json, read_jsonl
from s2t.studies.lab import Chart, Findings, Lab, Series

_BINS: dict[str, Any] = {"readout": "bins"}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "scope stream": {"adapter_scope": "stream"},
    "hard targets": {"ce_weight": 1.0, "listwise_weight": 0.0},
    "bins": _BINS,
    "bins, scope always": {**_BINS, "adapter_scope": "always"},
    "bins, scope stream": {**_BINS, "adapter_scope": "stream"},
    "bins, lambda 0 (the paper's)": {**_BINS, "prior_weight": 0.0},
    "bins, lambda 0.5": {**_BINS, "prior_weight": 0.5},
    "bins, lambda 2": {**_BINS, "prior_weight": 2.0},
    "bins, cross-entropy only": {**_BINS, "pairwise_weight": 0.0, "listwise_weight": 0.0},
    "bins, pairwise only": {**_BINS, "ce_weight": 0.0, "listwise_weight": 0.0},
    "bins, listwise KL only": {**_BINS, "ce_weight": 0.0, "pairwise_weight": 0.0, "listwise_weight": 1.0},
    "2 bins (a binary label)": {**_BINS, "num_bins": 2},
    "64 bins": {**_BINS, "num_bins": 64},
    "criticality from reserved tokens": {"criticality": "reserved"},
    "4 candidates": {"num_candidates": 4},
    "rank 4": {"lora_rank": 4, "lora_alpha": 8.0},
}
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def training(lab: Lab) -> Findings:
    """One setting of `s2t train` changed at a time, against the default on the same problems."""
    correct, rows, bars = {}, [], []
    greedy = _local(lab, "default", str(lab.trained()), with_greedy=True)
    for name, changed in ARMS.items():
        adapter = lab.trained() if not changed else lab.trained(f"train-{_slug(name)}", **changed)
        found = greedy if not changed else _local(lab, _slug(name), str(adapter))
        correct[name] = found["correct"]
        scores = found["strategies"]["s2t-local"]
        rows.append([name, scores["accuracy"], scores["ci95"], scores["trigger_rate"], scores["flip_rate"]])
        bars.append(Series(name, [0.0], [scores["accuracy"]], [tuple(scores["ci95"])]))
    tests = {name: paired_comparison(row, correct["default"]) for name, row in correct.items() if name != "default"}
    adjusted = dict(zip(tests, holm_p_values([test["p_value"] for test in tests.values()]), strict=True))
    table = [
        (*row, tests[row[0]]["difference"], tests[row[0]]["ci95"], adjusted[row[0]])
        if row[0] in tests
        else (*row, None, None, None)
        for row in rows
    ]
    columns = (
        "setting",
        "accuracy %",
        "95 %",
        "triggered %",
        "flips %",
        "against default, points %",
        "95 % of it",
        "p",
    )
    base = greedy["strategies"]["greedy"]["accuracy"]
    notes = [
        f"greedy: {100 * base:.1f} %. p is McNemar's against the default, after Holm's correction for {len(tests)} tests."
    ]
    return Findings(
        "One training setting changed at a time", columns, table, Chart("", "accuracy (%)", bars, "bar"), notes
    )


def size(lab: Lab) -> Findings:
    """s2t-local against the number of training problems; smaller sets are the beginnings of larger ones."""
    rows, line = [], Series("s2t-local", [], [], [])
    for share in _SHARES:
        count = max(1, round(share * lab.config.train_limit))
        is_all = share == 1.0
        groups = lab.collected() if is_all else lab.collected(f"collect-{count}", limit=count)
        adapter = lab.trained() if is_all else lab.trained(f"train-{count}", groups, **_same_steps(lab, share))
        scores = _local(lab, f"size-{count}", str(adapter))["strategies"]["s2t-local"]
        num_groups = read_json(groups / "collect.json")["num_groups"]
        rows.append((count, num_groups, scores["accuracy"], scores["ci95"], scores["trigger_rate"]))
        line.x.append(float(count))
        line.y.append(scores["accuracy"])
        line.ci95.append(tuple(scores["ci95"]))
    columns = ("training problems", "groups", "accuracy %", "95 %", "triggered %")
    chart = Chart("training problems", "accuracy of s2t-local (%)", [line], log_x=True)
    notes = ["Every size is trained for as many steps as the largest one (more epochs of fewer groups)."]
    return Findings("Accuracy by size of the training set", columns, rows, chart, notes)


def transfer(lab: Lab) -> Findings:
    """What the selector gains on templates it was trained on, on templates held out, and on other tasks."""
    adapter, config = str(lab.trained()), lab.config
    rows, bars = [], []
    for task in config.task_names:
        found = _local(lab, f"transfer-{_slug(task)}", adapter, with_greedy=True, task=task)
        parts = {"all templates": found}
        if task == config.task and "seen_templates" in found:
            parts |= {
                "templates seen in training": found["seen_templates"],
                "templates held out": found["unseen_templates"],
            }
        for part, scores in parts.items():
            paired = scores["paired"]["s2t-local vs greedy"]
            both = [scores["strategies"][name]["accuracy"] for name in ("greedy", "s2t-local")]
            count = scores["strategies"]["greedy"]["num_problems"]
            interval = paired.get("ci95_by_template", paired["ci95"])
            rows.append((task, part, count, *both, paired["difference"], interval, paired["p_value"]))
            label = part if len(config.task_names) == 1 or task == config.task else task
            bars.append(Series(label, [0.0], [paired["difference"]], [tuple(interval)]))
    columns = ("task", "problems of", "n", "greedy %", "s2t-local %", "gain, points %", "95 %", "p")
    chart = Chart("", "s2t-local over greedy (points)", bars, "bar")
    notes = [
        f"The adapter was trained on {config.task}. Intervals of templates seen and held out resample whole templates; p is "
        "McNemar's, which counts problems."
    ]
    return Findings("What carries over", columns, rows, chart, notes)


def _same_steps(lab: Lab, share: float) -> dict[str, Any]:
    """Epochs that give a part of the problems the optimizer steps of all of them."""
    return {"epochs": float(lab.training.get("epochs", 3.0)) / share}


def _local(lab: Lab, name: str, adapter: str, with_greedy: bool = False, **settings: Any) -> dict[str, Any]:
    """summary.json of s2t-local with an adapter, and which problems it solves as `correct`."""
    strategies = "greedy,s2t-local" if with_greedy else "s2t-local"
    folder = f"eval-{name}"
    summary = lab.evaluated(folder, strategies, adapter=adapter, **settings)
    results = read_jsonl(lab.folder / folder / "results.jsonl")
    summary["correct"] = np.array([r["is_correct"] for r in results if r["strategy"] == "s2t-local"])
    return summary


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).split())
