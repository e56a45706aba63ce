"""Selection inside the SLM against ordinary distillation: the same problems, LoRA and optimizer steps; and both together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from s2t.config import FitConfig
from s2t.core.stats import bootstrap_interval, holm_p_values, paired_comparison
from s2t.files import read_json, read_jsonl
from s2t.studies.lab import Chart, Findings, Lab, Series

LOCAL, GREEDY = "s2t-local", "greedy, the SLM as it is"
_ON = f"{LOCAL} on top of "
_FIT = tuple(FitConfig.__dataclass_fields__)


def distillation(lab: Lab) -> Findings:
    """s2t-local, the distillations and s2t-local on top of one; those on top under one seed, the others under `num_seeds`."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for number in range(lab.config.num_seeds):
        for name, found in _arms_of_seed(lab, lab.config.seed + number).items():
            arms.setdefault(name, []).append(found)
    correct = {name: np.array([found["correct"] for found in seeds]) for name, seeds in arms.items()}  # [S, N]
    tests = {name: paired_comparison(rows, correct[LOCAL]) for name, rows in correct.items() if name != LOCAL}
    adjusted = dict(zip(tests, holm_p_values([test["p_value"] for test in tests.values()]), strict=True))
    rows, bars = [], []
    for name, seeds in arms.items():
        accuracy, interval = float(correct[name].mean()), bootstrap_interval(correct[name])
        seen, unseen = (_mean(seeds, part) for part in ("seen_templates", "unseen_templates"))
        test = tests.get(name)
        compared = (test["difference"], test["ci95"], adjusted[name], test["detectable"]) if test else (None,) * 4
        rows.append((name, len(seeds), seeds[0]["steps"], accuracy, interval, seen, unseen, *compared))
        bars.append(Series(name, [0.0], [accuracy], [interval]))
    columns = (
        *("arm", "seeds", "optimizer steps", "accuracy %", "95 %", "seen templates %", "held out %"),
        *("over s2t-local, points %", "95 % of it", "p (Holm)", "least found, points %"),
    )
    notes = [
        f"{lab.config.train_limit:,} training problems for every arm, the same under one seed; LoRA, rate and number of "
        "optimizer steps are the selector's, and a step of distillation reads as many answers as one of the selector reads "
        "trajectories. A seed is one of problems and of training.",
        "p is the exact McNemar test (a sign-flip test where there are several seeds) after Holm's correction for "
        f"{len(tests)} tests; intervals resample problems and seeds.",
        *(_by_seed(name, rows) for name, rows in correct.items() if len(rows) > 1),
        *(_added(name, rows, correct) for name, rows in correct.items() if name.partition(_ON)[2] in correct),
    ]
    return Findings(
        "Selection and ordinary distillation on equal terms",
        columns,
        rows,
        Chart("", "accuracy (%)", bars, "bar"),
        notes,
    )


def distilled(lab: Lab, method: str, seed: int) -> Path:
    """A distilled SLM with the selector's problems, LoRA, rate, number of steps and examples per step."""
    steps, per_step = _terms(lab, seed)
    fit = {name: value for name, value in lab.training.items() if name in _FIT and name != "epochs"}
    settings = {"method": method, "seed": seed, "max_steps": steps, "batch_answers": per_step, **fit}
    return lab.distilled(f"{method}{_mark(lab, seed)}", **settings)


def _arms_of_seed(lab: Lab, seed: int) -> dict[str, dict[str, Any]]:
    """Every arm under one seed: which test problems it solves, its summary and its optimizer steps."""
    mark = _mark(lab, seed)
    adapter = _selector(lab, seed)
    steps = read_json(adapter.parent / "train.json")["num_steps"]
    summary = lab.evaluated(f"eval-local{mark}", "greedy,s2t-local" if not mark else "s2t-local", adapter=str(adapter))
    arms = {} if mark else {GREEDY: _found(lab.folder / "eval-local", summary, "greedy", 0)}
    arms[LOCAL] = _found(lab.folder / f"eval-local{mark}", summary, "s2t-local", steps)
    for arm in lab.config.arm_names:
        method, plus, _ = arm.partition("+")
        if arm == LOCAL or (plus and mark):
            continue
        slm = distilled(lab, method, seed)
        if plus:
            arms[_ON + method] = _on_top(lab, method, slm, steps)
        else:
            own = lab.evaluated(f"eval-{method}{mark}", "greedy", slm=str(slm))
            arms[method] = _found(lab.folder / f"eval-{method}{mark}", own, "greedy", steps)
    return arms


def _on_top(lab: Lab, method: str, slm: Path, steps: int) -> dict[str, Any]:
    """The whole chain once more on a distilled SLM, whose divergence points are its own."""
    config = replace(lab.config, slm=str(slm), revision=None, out=str(lab.folder / f"on-top-{method}"), base=None)
    own = Lab(config)
    adapter = own.trained()
    summary = own.evaluated("eval", "s2t-local", adapter=str(adapter))
    total = steps + read_json(adapter.parent / "train.json")["num_steps"]
    return _found(own.folder / "eval", summary, "s2t-local", total)


def _selector(lab: Lab, seed: int) -> Path:
    if not (mark := _mark(lab, seed)):
        return lab.trained()
    return lab.trained(f"train{mark}", lab.collected(f"collect{mark}", seed=seed), seed=seed)


def _terms(lab: Lab, seed: int) -> tuple[int, int]:
    """Optimizer steps of the selector, and trajectories per step."""
    found = read_json(_selector(lab, seed).parent / "train.json")
    epochs = float(lab.training.get("epochs", FitConfig.epochs))
    return found["num_steps"], max(1, round(epochs * lab.config.train_limit / found["num_steps"]))


def _mark(lab: Lab, seed: int) -> str:
    """Behind the names of runs under another seed than the first."""
    return "" if seed == lab.config.seed else f"-seed{seed}"


def _found(folder: Path, summary: dict[str, Any], strategy: str, steps: int) -> dict[str, Any]:
    results = [r["is_correct"] for r in read_jsonl(folder / "results.jsonl") if r["strategy"] == strategy]
    parts = {
        part: summary[part]["strategies"][strategy]["accuracy"]
        for part in ("seen_templates", "unseen_templates")
        if part in summary
    }
    return {"correct": results, "steps": steps, **parts}


def _mean(seeds: list[dict[str, Any]], part: str) -> float | None:
    values = [found[part] for found in seeds if part in found]
    return float(np.mean(values)) if values else None


def _added(name: str, rows: np.ndarray, correct: dict[str, np.ndarray]) -> str:
    """What selection adds to the distilled SLM that it stands on, under the first seed."""
    method = name.partition(_ON)[2]
    test = paired_comparison(rows, correct[method][:1])
    low, high = (100 * bound for bound in test["ci95"])
    return (
        f"{name}, over that {method}: {100 * test['difference']:.1f} points ({low:.1f} to {high:.1f}), p = {test['p_value']:.3f} "
        f"(McNemar, by itself); {test['wins']} won, {test['losses']} lost."
    )


def _by_seed(name: str, rows: np.ndarray) -> str:
    return f"{name} by seed: {', '.join(f'{100 * row.mean():.1f}' for row in rows)} %."
