"""Studies of a pair: local sufficiency against K, task, SLM, position and kind of token; and what a pair of each size gains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s2t.core.stats import clustered_rate_interval
from s2t.files import read_json, read_tables
from s2t.measure import KS
from s2t.model.load import load_model
from s2t.studies.lab import Chart, Findings, Lab, Series

_SHOWN = (1, 2, 4, 8, 16)


def sufficiency(lab: Lab) -> Findings:
    """Hit@K at the divergence points of the test split, for every SLM and task."""
    rows, series = [], []
    for slm in lab.config.slm_names:
        for task in lab.config.task_names:
            found = _measure(lab, slm, task)
            rates, intervals = found["hit_rate"], found["hit_rate_ci95"]
            points = found["num_divergence_points"]
            shown = [rates.get(str(k)) for k in _SHOWN]
            counts = (found["num_problems"], points, found["threshold"], found["trigger_rate"])
            rows.append((slm, task, *counts, *shown, intervals.get("8")))
            if rates:
                name = " · ".join(part for part in (slm, task if len(lab.config.task_names) > 1 else "") if part)
                series.append(_curve(name, rates, intervals))
    columns = (
        "SLM",
        "task",
        "problems",
        "divergence points",
        "above, nats",
        "triggered %",
        *(f"hit@{k} %" for k in _SHOWN),
        "hit@8, 95 %",
    )
    chart = Chart("K, candidates of the SLM", "hit@K at divergence points (%)", series, log_x=True)
    notes = [
        f"Divergence points: steps above the {100 * lab.config.quantile:g} % quantile of the pair's own divergences on the "
        f"{lab.config.split} split; the first tokens of an answer never count. Intervals resample problems.",
        *(
            f"{slm} on {task}: no divergence point, so no hit rate and no curve."
            for slm, task, _, n, *_ in rows
            if not n
        ),
    ]
    return Findings("Local sufficiency by SLM and task", columns, rows, chart, notes)


def positions(lab: Lab) -> Findings:
    """Where divergence points are, and hit@1 and hit@8 there: place in the answer, kind of token, size of the divergence."""
    config = lab.config
    steps = _live_steps(_measure_folder(lab, config.slm, config.task))
    threshold = _measure(lab, config.slm, config.task)["threshold"]
    values, ranks = steps["divergence"].to_numpy(), steps["rank"].to_numpy()
    owners = np.asarray(steps["problem_id"].to_pylist())
    points = values > threshold
    groups = _by_place(steps) | _by_kind(lab, steps) | _by_divergence(values, points)
    rows, ones, eights = [], [], []
    for name, inside in groups.items():
        chosen = points & inside
        count, total = int(chosen.sum()), int(inside.sum())
        if total == 0:
            continue
        hit = {k: (float((ranks[chosen] < k).mean()) if count else None) for k in (1, 8)}
        intervals = {k: clustered_rate_interval(ranks[chosen] < k, owners[chosen]) if count else None for k in (1, 8)}
        rows.append((name, total, count, count / total, hit[1], intervals[1], hit[8], intervals[8]))
        if count:
            ones.append(Series(f"{name}, hit@1", [0.0], [hit[1] or 0.0], [intervals[1]]))
            eights.append(Series(f"{name}, hit@8", [0.0], [hit[8] or 0.0], [intervals[8]]))
    columns = ("steps", "all", "divergence points", "share %", "hit@1 %", "hit@1, 95 %", "hit@8 %", "hit@8, 95 %")
    chart = Chart(
        "", "hit rate at divergence points (%)", [s for pair in zip(ones, eights, strict=True) for s in pair], "bar"
    )
    notes = [f"{config.slm} on {config.task}; divergence points above {threshold:.3g} nats."]
    return Findings("Divergence points by place, token and size", columns, rows, chart, notes)


def scaling(lab: Lab) -> Findings:
    """The whole chain for every SLM: greedy, s2t-local, s2t, and what the selector gains, against the SLM's size."""
    rows: list[tuple[Any, ...]] = []
    lines: dict[str, Series] = {name: Series(name, [], [], []) for name in ("greedy", "s2t-local", "s2t")}
    for slm in lab.config.slm_names:
        own = Lab(lab.config.for_slm(slm))
        calibration = str(own.calibrated())
        adapter = str(own.trained())
        summary = own.evaluated("eval", "greedy,s2t-local,s2t", adapter=adapter, calibration=calibration)
        size = summary["pair"]["slm_params"]
        scores, paired = summary["strategies"], summary["paired"]["s2t-local vs greedy"]
        accuracies = [scores[name]["accuracy"] for name in lines]
        rows.append((slm, size, *accuracies, paired["difference"], paired["ci95"], paired["p_value"]))
        for name, line in lines.items():
            line.x.append(size)
            line.y.append(scores[name]["accuracy"])
            line.ci95.append(tuple(scores[name]["ci95"]))
    order = sorted(range(len(rows)), key=lambda i: rows[i][1])
    series = [
        Series(s.name, [s.x[i] for i in order], [s.y[i] for i in order], [s.ci95[i] for i in order])
        for s in lines.values()
    ]
    columns = ("SLM", "parameters", "greedy %", "s2t-local %", "s2t %", "s2t-local - greedy, points %", "95 %", "p")
    chart = Chart("parameters of the SLM", "accuracy (%)", series, log_x=True)
    return Findings("Accuracy by size of the SLM", columns, [rows[i] for i in order], chart)


def _measure_folder(lab: Lab, slm: str, task: str) -> Path:
    name = f"measure-{_slug(slm)}-{_slug(task)}"
    return lab.measured(name, slm=slm, task=task, split=lab.config.split, limit=lab.config.limit)


def _measure(lab: Lab, slm: str, task: str) -> dict[str, Any]:
    return read_json(_measure_folder(lab, slm, task) / "measure.json")


def _live_steps(folder: Path) -> pa.Table:
    steps = read_tables(sorted(folder.glob("steps-*.parquet")))
    return steps.filter(pa.array(~steps["is_warmup"].to_numpy()))


def _curve(name: str, rates: dict[str, float], intervals: dict[str, Any]) -> Series:
    ks = [k for k in KS if str(k) in rates]
    return Series(name, [float(k) for k in ks], [rates[str(k)] for k in ks], [tuple(intervals[str(k)]) for k in ks])


def _by_place(steps: pa.Table) -> dict[str, np.ndarray]:
    """Thirds of each answer."""
    places, owners = steps["step"].to_numpy(), np.asarray(steps["problem_id"].to_pylist())
    _, owner = np.unique(owners, return_inverse=True)
    last = np.zeros(owner.max() + 1)
    np.maximum.at(last, owner, places)
    share = places / np.maximum(last[owner], 1)
    return {
        "first third of the answer": share < 1 / 3,
        "second third": (share >= 1 / 3) & (share < 2 / 3),
        "last third": share >= 2 / 3,
    }


def _by_kind(lab: Lab, steps: pa.Table) -> dict[str, np.ndarray]:
    """Kind of the token that the SLM wrote."""
    tokenizer = load_model(lab.config.slm, **lab.config.load_options).tokenizer
    ids = steps["token_id"].to_numpy()
    known = {int(i): _kind(str(tokenizer.decode([int(i)]))) for i in np.unique(ids)}
    kinds = np.asarray([known[int(i)] for i in ids])
    return {f"token: {kind}": kinds == kind for kind in ("digits", "operator", "word", "other")}


def _kind(text: str) -> str:
    text = text.strip()
    tests: dict[str, Callable[[str], bool]] = {
        "digits": lambda t: any(c.isdigit() for c in t),
        "operator": lambda t: bool(t) and all(c in "+-*/=×÷<>^%" for c in t),
        "word": lambda t: any(c.isalpha() for c in t),
    }
    return next((name for name, fits in tests.items() if fits(text)), "other")


def _by_divergence(values: np.ndarray, points: np.ndarray) -> dict[str, np.ndarray]:
    """Quarters of the divergence points."""
    if not points.any():
        return {}
    edges = np.quantile(values[points], [0.25, 0.5, 0.75])
    place = np.searchsorted(edges, values)
    names = ("smallest quarter of divergence", "second quarter", "third quarter", "largest quarter of divergence")
    return {name: points & (place == i) for i, name in enumerate(names)}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")
