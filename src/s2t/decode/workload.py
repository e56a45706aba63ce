"""What every workflow does before it writes tokens: open the task, make requests, read thresholds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from s2t.config import DecodeConfig, ShardConfig, TaskConfig
from s2t.decode.pair import Pair, room_for
from s2t.decode.remote.counts import merge_reports
from s2t.errors import DataError
from s2t.files import RunFolder, read_json, read_tables, write_json
from s2t.methods.strategies import Strategy, build_strategy
from s2t.model.adapter import AdapterConfig
from s2t.model.merged import base_model
from s2t.model.tiny import is_embedded
from s2t.records import Problem, Request
from s2t.scale import RayWorkers, open_workers
from s2t.tasks.problems import Task, load_task
from s2t.workers import Workers

S = TypeVar("S")
R = TypeVar("R")


def open_task(config: TaskConfig, slm: str, revision: str | None = None) -> Task:
    """The task under its prompt style; `auto` is plain for the embedded pair and step by step for others."""
    style = config.prompt
    if style == "auto":
        style = "plain" if is_embedded(base_model(slm, revision)) else "cot"
    return load_task(config.task, style)


def task_for_workers(task: Task, config: TaskConfig) -> Task | None:
    """The task where this process does the work; None where workers must open their own, since tasks hold functions."""
    return task if config.workers == 1 and config.ray is None else None


def shard_workers(open: Callable[[], S], config: TaskConfig) -> Workers[S] | RayWorkers[S]:
    """Who works the shards: processes, actors, or threads that take turns where an LLM on servers is waited for."""
    is_remote = isinstance(config, ShardConfig) and bool(config.llm_urls)
    threads = config.shards_in_flight if isinstance(config, ShardConfig) and is_remote else 1
    return open_workers(open, config, threads)


class ServerReport:
    """What asking the LLM's servers (or the SLM's) took, over all processes and restarts of a run; kept in NAME.json."""

    def __init__(self, run: RunFolder, name: str = "llm_server") -> None:
        self._name, self._path = name, run.file(f"{name}.json")

    def add(self, report: dict[str, Any] | None) -> None:
        """Add what one shard took; None, of an LLM in this process, is nothing."""
        if report is not None:
            write_json(self._path, merge_reports(self._read(), report))

    def beside(self, write: Callable[[Path, R], None]) -> Callable[[Path, tuple[R, dict[str, Any] | None]], None]:
        """A writer of (result, what one shard took): the result goes to `write`, the rest here."""

        def write_both(path: Path, found: tuple[R, dict[str, Any] | None]) -> None:
            result, report = found
            self.add(report)  # first: a shard that is there is not asked for again
            write(path, result)

        return write_both

    def section(self) -> dict[str, Any]:
        """The part of a summary that says it; empty where no server was asked."""
        found = self._read()
        return {} if found is None else {self._name: found}

    def _read(self) -> dict[str, Any] | None:
        return read_json(self._path) if self._path.exists() else None


def problems_outside(task: Task, split: str, limit: int, seed: int, heldout: frozenset[str]) -> list[Problem]:
    """The first `limit` problems of a split whose template is not held out."""
    if not heldout:
        return task.problems(split, limit, seed)
    wanted = limit
    while True:
        found = task.problems(split, wanted, seed)
        kept = [problem for problem in found if problem.template not in heldout]
        if len(kept) >= limit or len(found) < wanted:
            return kept[:limit]
        wanted = wanted * 3 // 2 + 8


def requests_for(
    pair: Pair, task: Task, problems: Sequence[Problem], num_samples: int = 1, system: str | None = None
) -> list[Request]:
    """One request per problem and sample, numbered problem by problem; keys make samples independent of the batch."""
    requests = []
    for place, problem in enumerate(problems):
        request = pair.request(place * num_samples, task.prompt(problem), system=system)
        room_for(request, pair.context_length, f"problem {problem.problem_id}")  # raises where there is none
        for k in range(num_samples):
            requests.append(replace(request, index=request.index + k, key=f"{problem.problem_id}/{k}"))
    return requests


def strategy_of(name: str, config: DecodeConfig, trained: AdapterConfig | None = None, seed: int = 0) -> Strategy:
    """A strategy from a command's settings: its threshold and K are the settings' own, else those of the selector that was
    trained, else of the calibration file. Raises as `build_strategy`, and DataError for what is no calibration file.
    """
    thresholds = read_thresholds(config.calibration) | (trained.thresholds if trained is not None else {})
    return build_strategy(name, config, thresholds, trained.num_candidates if trained is not None else None, seed)


def read_thresholds(calibration: str | Path | None) -> dict[str, float]:
    """Thresholds per trigger from a calibration.json (or the folder that holds it); {} for None."""
    if calibration is None:
        return {}
    path = Path(calibration)
    path = path / "calibration.json" if os.path.isdir(path) else path
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("thresholds"), dict):
        raise DataError(f"{path} holds no thresholds; pass the calibration.json that `s2t calibrate` wrote.")
    for name, value in data["thresholds"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(
                f"{path}: the threshold of {name} must be a number; got {str(value)[:60]!r}; calibrate again."
            )
    return {str(name): float(value) for name, value in data["thresholds"].items()}


def shards_of(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    """Consecutive chunks of at most `size` problems; a shard's content never depends on the others."""
    return [problems[i : i + size] for i in range(0, len(problems), size)]


def check_shards(run: RunFolder, prefix: str, suffix: str, parts: Sequence[Sequence[Problem]]) -> None:
    """Raise DataError where a shard on disk is of other problems than it would be of now: the task's file has changed since."""
    for path in run.shards(prefix, suffix):
        index = int(path.stem.rpartition("-")[2])
        if index >= len(parts) or _problem_ids(path) != [problem.problem_id for problem in parts[index]]:
            raise DataError(
                f"shard {path} holds other problems than the task has there now; remove the folder or use another --out."
            )


def _problem_ids(path: Path) -> list[str]:
    """The problems of a shard in order: of eval's JSON, or of the id column alone of a table."""
    if path.suffix == ".json":
        return [result["problem_id"] for result in read_json(path)["results"]]
    return read_tables([path], ["problem_id"])["problem_id"].unique().to_pylist()
