"""A study of definitions: which steps of this run are divergence points, and what the selector was trained on.

Everything is read from the runs themselves: problems, templates, steps and points of every split, that no problem is in two of
them, and how the divergences of the training trajectories lie beside those of the other splits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from s2t.config import EvalConfig
from s2t.decode.workload import open_task, problems_outside
from s2t.files import load_run, read_json, read_tables
from s2t.records import Problem
from s2t.studies.lab import Chart, Findings, Lab, Series
from s2t.tasks.problems import check_disjoint, heldout_templates, split_digest

_GRID = 61


def data(lab: Lab) -> Findings:
    """Problems, steps and divergence points of the three splits, their digests, and the distribution of divergence in each."""
    threshold = lab.thresholds()["divergence"]
    values = {
        "training": _trajectories(lab.collected()),
        "calibration": _measured(lab.measured()),
        lab.config.split: _measured(lab.measured("measure-own", split=lab.config.split, limit=lab.config.limit)),
    }
    problems = _problems(lab)
    _check(problems)
    held = set(read_json(lab.collected() / "collect.json")["heldout_templates"])
    writers = {"training": f"policy {load_run(lab.collected(), 'collect')['config']['policy']}"}
    rows = []
    for name, steps in values.items():
        templates = {problem.template for problem in problems[name] if problem.template is not None}
        points = int((steps > threshold).sum())
        rows.append(
            (
                *(name, writers.get(name, "greedy"), len(problems[name]), len(templates), len(templates & held)),
                *(len(steps), points, points / len(steps), points / len(problems[name]), split_digest(problems[name])),
            )
        )
    columns = (
        *("split", "written by", "problems", "templates", "of them held out of training"),
        *("steps", "divergence points", "share of steps %", "points a problem", "digest of the questions"),
    )
    series = [Series(name, *_above(steps)) for name, steps in values.items()]
    if threshold > 0:
        series.append(Series("threshold", [threshold, threshold], [0.0, max(max(one.y) for one in series)]))
    chart = Chart("divergence, nats", "steps above it (%)", series, log_x=True)
    config = load_run(lab.measured(), "measure")["config"]
    notes = [
        f"A divergence point is a step whose divergence ({config['divergence']}, on the SLM's {config['support_size']} likeliest "
        f"tokens and one bucket for all others) is above {threshold:.4g} nats: the {100 * lab.config.quantile:g} % quantile over "
        f"the steps of the calibration split's greedy answers. The first {config['warmup_steps']} tokens of an answer are none.",
        "A training example is a point of a training trajectory: its prefix, the SLM's 16 likeliest tokens, and p_L of each. "
        "Criticality is trained on all steps of these trajectories. No question is in two splits (checked), and templates held "
        "out are in none of the training trajectories.",
        *(["The threshold is 0 nats, which a logarithmic axis cannot show."] if threshold <= 0 else []),
    ]
    return Findings("Divergence points and training data of this run", columns, rows, chart, notes)


def _problems(lab: Lab) -> dict[str, list[Problem]]:
    """The problems of the runs: what the same task, split, seed and limit give."""
    config, collected = lab.config, load_run(lab.collected(), "collect")["config"]
    measured = load_run(lab.measured(), "measure")["config"]
    task = open_task(EvalConfig(**lab.problems), config.slm, config.revision)
    held = heldout_templates(task.templates(), collected["heldout_templates"])
    return {
        "training": problems_outside(task, collected["split"], collected["limit"], collected["seed"], held),
        "calibration": task.problems("calibration", measured["limit"], measured["seed"]),
        config.split: task.problems(config.split, config.limit, config.seed),
    }


def _check(problems: dict[str, list[Problem]]) -> None:
    """Raise OverlapError where two splits share a question."""
    names = list(problems)
    for place, left in enumerate(names):
        for right in names[place + 1 :]:
            check_disjoint(problems[left], problems[right], f"{left} and {right}")


def _measured(folder: Path) -> np.ndarray:
    steps = read_tables(sorted(folder.glob("steps-*.parquet")), ["divergence", "is_warmup"])
    return steps["divergence"].to_numpy()[~steps["is_warmup"].to_numpy()]


def _trajectories(folder: Path) -> np.ndarray:
    """Divergences past the warm-up of every collected trajectory."""
    warmup = load_run(folder, "collect")["config"]["warmup_steps"]
    table = read_tables(sorted(folder.glob("groups-*.parquet")), ["divergence"])
    column: pa.ChunkedArray = table["divergence"]
    return np.concatenate([np.asarray(row, dtype=np.float32)[warmup:] for row in column.to_pylist()])


def _above(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Share of the steps above each of many divergences, 1e-4 nats to the largest."""
    grid = np.geomspace(1e-4, max(float(values.max()), 1e-3), _GRID)
    ordered = np.sort(values)
    return grid.tolist(), (1 - np.searchsorted(ordered, grid, side="right") / len(ordered)).tolist()
