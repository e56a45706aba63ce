"""Strategies over finished answers: each chooses, problem by problem, among what other strategies of the same run wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2t.config import METHODS, EvalConfig
from s2t.decode.workload import read_thresholds
from s2t.errors import DataError
from s2t.files import iter_jsonl, load_run
from s2t.methods.answers import Chooser, Known
from s2t.methods.base import find
from s2t.records import Problem
from s2t.tasks.problems import Task, check_disjoint, load_task

Run = tuple[list[dict[str, Any]], float]
"""Results and seconds of one strategy under one seed."""


def combine(
    name: str, config: EvalConfig, task: Task, problems: Sequence[Problem], results: Mapping[str, list[Run]]
) -> list[Run]:
    """Results and seconds of a strategy that chooses among others' answers, seed by seed; what draws nothing has one seed.

    Raises ConfigError or DataError where it has to learn and what `known` names is no run to learn from.
    """
    method = METHODS[name]
    assert method.answers is not None
    kind: type[Chooser] = find(method.answers)
    known = known_answers(config, problems) if kind.learns else Known()
    chooser = kind(config, read_thresholds(config.calibration), known)
    return [
        _one(name, chooser, problems, each) for each in _by_seed([results[base] for base in method.over], method.over)
    ]


def _by_seed(runs: Sequence[list[Run]], names: Sequence[str]) -> list[dict[str, Run]]:
    count = max(map(len, runs))
    return [{name: run[seed % len(run)] for name, run in zip(names, runs, strict=True)} for seed in range(count)]


def _one(name: str, chooser: Chooser, problems: Sequence[Problem], runs: Mapping[str, Run]) -> Run:
    rows = []
    for place, problem in enumerate(problems):
        answers = {base: run[0][place] for base, run in runs.items()}
        rows.append(chooser.choose(problem.question, answers) | {"strategy": name})
    return rows, sum(run[1] for run in runs.values())


def known_answers(config: EvalConfig, problems: Sequence[Problem]) -> Known:
    """Questions and answers of the finished run that `known` names; none where it names none.

    Raises DataError where the run holds one of `problems`, or no answers of both models.
    """
    if config.known is None:
        return Known()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    run = load_run(config.known, "eval")["config"]
    for _, result in iter_jsonl(Path(config.known) / "results.jsonl"):
        found.setdefault(result["problem_id"], {})[result["strategy"]] = result
    others = load_task(run["task"], "plain").problems(run["split"], run["limit"], run["seed"])
    check_disjoint(problems, others, "the problems and those of --known")
    whole = [p for p in others if {"confidence", "llm"} <= found.get(p.problem_id, {}).keys()]
    if not whole:
        raise DataError(
            f"{config.known} holds no answers of confidence and llm; run s2t eval --strategies confidence,llm."
        )
    return Known([p.question for p in whole], [found[p.problem_id] for p in whole])
