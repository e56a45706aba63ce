"""Local sufficiency of a pair on the SLM's own trajectories, and thresholds from it.

`measure` rolls out greedily, reads the trajectories with both models in batched prefills and counts how often
the LLM's top token is among the SLM's first K; `calibrate` turns such a run into thresholds.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s2t.config import HOW_IT_RUNS, CalibrateConfig, DecodeConfig, MeasureConfig
from s2t.core.calibration import threshold_at
from s2t.core.stats import clustered_rate_interval, hit_rate_curve
from s2t.decode.label import Labels
from s2t.decode.opening import check_needs, open_pair
from s2t.decode.workload import (
    ServerReport,
    check_shards,
    open_task,
    requests_for,
    shard_workers,
    shards_of,
    task_for_workers,
)
from s2t.errors import DataError
from s2t.files import RunFolder, load_run, read_tables, write_json, write_table
from s2t.methods.strategies import build_strategy
from s2t.progress import counted_as
from s2t.records import Generated, Problem
from s2t.scale import Shard, to_files, write_missing
from s2t.tasks.problems import Task

KS = (1, 2, 4, 8, 16)
_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)  # quantiles of divergence that bound the bins
_NUM_RESAMPLES = 2000


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Measure a pair and return measure.json; resumes by shard. Source: arXiv 2604.26940, local sufficiency."""
    check_needs(config, ["greedy"], with_llm=True)
    run = RunFolder.open(config.out, "measure", config, ignore=HOW_IT_RUNS)
    task = open_task(config, config.slm, config.revision)
    problems = task.problems(config.split, config.limit, config.seed)
    parts = shards_of(problems, config.shard_size)
    check_shards(run, "steps", "parquet", parts)
    shards = to_files(parts, lambda i: run.shard("steps", i, "parquet"))
    servers = ServerReport(run)
    with shard_workers(partial(_Measurer, config, task_for_workers(task, config)), config) as workers:
        write_missing(workers, _Measurer.shard, shards, servers.beside(write_table), "measure")
    result = summarize(read_tables(run.shards("steps", "parquet")), config.quantile, config.threshold)
    result = {
        "task": task.name,
        "split": config.split,
        "num_problems": len(problems),
        "seed": config.seed,
        **result,
        **servers.section(),
    }
    write_json(run.file("measure.json"), result)
    run.finish()
    return result


class _Measurer:
    """Rolls a shard out and labels it."""

    def __init__(self, config: MeasureConfig, task: Task | None) -> None:
        self.config, self.task = config, task or open_task(config, config.slm, config.revision)
        self.pair = open_pair(config, ["greedy"], with_llm=True)

    def shard(self, shard: Shard[Problem]) -> tuple[pa.Table, dict[str, Any] | None]:
        """One shard's steps, and what asking servers took."""
        config, pair, problems = self.config, self.pair, shard.items
        requests = requests_for(pair, self.task, problems)
        with counted_as(1 / 2):  # written, then read
            done = pair.write(build_strategy("greedy", DecodeConfig(), {}), requests, config.max_new_tokens)
            labels = pair.label(
                requests,
                [sequence.token_ids for sequence in done],
                max(KS),
                config.support_size,
                config.divergence,
                config.support,
            )
        tables = [_steps_table(*row, config.warmup_steps) for row in zip(problems, done, labels, strict=True)]
        return pa.concat_tables(tables), pair.take_report()


def _steps_table(problem: Problem, sequence: Generated, labels: Labels, warmup_steps: int) -> pa.Table:
    steps = np.arange(len(sequence.token_ids), dtype=np.int32)
    return pa.table(
        {
            "problem_id": pa.array([problem.problem_id] * len(steps), pa.string()),
            "step": steps,
            "token_id": np.asarray(sequence.token_ids, dtype=np.int32),
            "divergence": labels.divergence,
            "entropy": labels.entropy,
            "rank": labels.rank,
            "is_warmup": steps < warmup_steps,
        }
    )


def summarize(steps: pa.Table, quantile: float, threshold: float | None) -> dict[str, Any]:
    """The numbers of measure.json from per-step rows; warm-up steps never count as divergence points."""
    live = steps.filter(pa.array(~steps["is_warmup"].to_numpy()))
    values = live["divergence"].to_numpy()
    if threshold is None:
        threshold, _ = threshold_at(values, quantile)
    ranks, problems = live["rank"].to_numpy(), np.asarray(live["problem_id"].to_pylist())
    points = values > threshold
    curve = hit_rate_curve(ranks[points], KS) if points.any() else {}
    intervals = _clustered_intervals(ranks[points], problems[points])
    return {
        "num_steps": steps.num_rows,
        "num_divergence_points": int(points.sum()),
        "trigger_rate": float(points.sum() / max(steps.num_rows, 1)),
        "threshold": threshold,
        "quantile": quantile,
        "hit_rate": {str(k): rate for k, rate in curve.items()},
        "hit_rate_ci95": {str(k): list(intervals[k]) for k in intervals},
        "hit_rate_by_divergence": _by_divergence(values, ranks),
    }


def _clustered_intervals(ranks: np.ndarray, problems: np.ndarray) -> dict[int, tuple[float, float]]:
    """Bootstrap over problems, since the points of one problem are not independent."""
    return {k: clustered_rate_interval(ranks < k, problems, _NUM_RESAMPLES) for k in KS} if ranks.size else {}


def _by_divergence(values: np.ndarray, ranks: np.ndarray) -> list[dict[str, Any]]:
    """Hit rates in bins between quantiles of divergence; the first holds its lower edge, too, so every step is in one."""
    edges = np.unique(np.quantile(values, _EDGES)) if values.size else np.zeros(1)  # many steps may be at the smallest
    place, rows = np.searchsorted(edges[1:], values), []
    for i, (low, high) in enumerate(list(pairwise(edges)) or [(edges[0], edges[0])]):
        inside = place == i
        if inside.any():
            rates = {str(k): rate for k, rate in hit_rate_curve(ranks[inside], KS).items()}
            rows.append({"low": float(low), "high": float(high), "num_steps": int(inside.sum()), "hit_rate": rates})
    return rows


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Thresholds at a quantile of a measured calibration run, with the trigger rate to expect; writes calibration.json."""
    manifest = load_run(config.run, "measure")
    if manifest["config"]["split"] != "calibration":
        raise DataError(
            f"{config.run} measured the {manifest['config']['split']} split; thresholds come from the calibration split: "
            "run `s2t measure --split calibration`."
        )
    run = RunFolder.open(config.out, "calibrate", config)
    steps = read_tables(sorted(Path(config.run).glob("steps-*.parquet")), ["divergence", "entropy", "is_warmup"])
    live = ~steps["is_warmup"].to_numpy()
    thresholds, rates = {}, {}
    for name in ("divergence", "entropy"):
        thresholds[name], rate = threshold_at(steps[name].to_numpy()[live], config.quantile)
        rates[name] = rate * float(live.mean())
    thresholds["random"] = float(
        (steps["divergence"].to_numpy()[live] > thresholds["divergence"]).mean()
    )  # a probability
    rates["random"] = rates["divergence"]
    result = {
        "thresholds": thresholds,
        "trigger_rates": rates,
        "trigger_rate": rates["divergence"],
        "quantile": config.quantile,
        "num_steps": steps.num_rows,
        "task": manifest["config"]["task"],
        "pair": {"slm": manifest["config"]["slm"], "llm": manifest["config"]["llm"]},
    }
    write_json(run.file("calibration.json"), result)
    run.finish()
    return result
