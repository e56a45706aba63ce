"""Problems x strategies to graded results: accuracy with intervals, paired tests on the same problems, and every cost.

Work is cut into shards of problems per strategy; a killed run resumes by shard. Adapters refuse test problems
they were trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2t.config import NEEDS_LLM, EvalConfig
from s2t.core.stats import bootstrap_interval, paired_comparison
from s2t.decode.label import Labels
from s2t.decode.loop import Request
from s2t.decode.session import Generated, Session
from s2t.decode.strategies import Strategy, build_strategy, vote
from s2t.decode.workload import open_task, read_thresholds, requests_for, shards_of, task_for_workers
from s2t.files import RunFolder, read_json, write_json, write_lines, write_text
from s2t.model.adapter import AdapterConfig, selector_config, selector_problems
from s2t.progress import progress
from s2t.records import Cost, Problem, Result, Step
from s2t.tasks.problems import Task, check_disjoint, heldout_templates
from s2t.workers import Workers

_COSTS = ("slm_forwards", "llm_forwards", "slm_processed", "llm_processed", "slm_flops", "llm_flops")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run all strategies and return summary.json; writes results.jsonl, traces.jsonl and the shards they come from."""
    names = config.strategy_names
    adapter = selector_config(config.adapter, config.slm)
    run = RunFolder.open(config.out, "eval", config, ignore=("workers",))
    task = open_task(config, config.slm)
    problems = task.problems(config.split, config.limit, config.seed)
    trained = selector_problems(config.adapter, config.slm)
    check_disjoint(problems, trained, f"the {config.split} problems and the adapter's")
    _run_missing(config, run, task, problems, adapter)
    results = {name: _read_results(run, name) for name in names}
    summary = _summary(config, run, task, problems, results, adapter)
    write_text(run.file("results.jsonl"), "".join(_line(r) for name in names for r in results[name][0]))
    write_lines(run.file("traces.jsonl"), _trace_lines(run, names))
    write_json(run.file("summary.json"), summary)
    run.finish()
    return summary


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _compact(trace: Mapping[str, Any]) -> str:
    return json.dumps(trace, ensure_ascii=False, separators=(",", ":"))


def _run_missing(
    config: EvalConfig, run: RunFolder, task: Task, problems: Sequence[Problem], adapter: AdapterConfig | None
) -> None:
    """Decode and grade every shard that is not on disk yet; models are loaded only when one is missing."""
    thresholds = read_thresholds(config.calibration) | (adapter.thresholds if adapter is not None else {})
    k = adapter.num_candidates if adapter is not None else None
    strategies = [build_strategy(name, config, thresholds, k, config.seed) for name in config.strategy_names]
    shards = dict(enumerate(shards_of(problems, config.shard_size)))
    with Workers(partial(_Evaluator, config, task_for_workers(task, config)), config.workers) as workers:
        for strategy in strategies:
            paths = {i: run.shard(f"results-{strategy.name}", i, "json") for i in shards}
            jobs = [(strategy, i, shard) for i, shard in shards.items() if not paths[i].exists()]
            if not jobs:
                continue
            missing = sum(len(shard) for _, _, shard in jobs)
            with progress(strategy.name, len(problems), len(problems) - missing) as advance:
                for (_, i, shard), result in workers.map(_Evaluator.shard, jobs):
                    write_json(run.file("pair.json"), result.pop("pair"))
                    write_json(paths[i], result)
                    advance(len(shard))


class _Evaluator:
    """Decodes and grades shards; the models are loaded and warm."""

    def __init__(self, config: EvalConfig, task: Task | None) -> None:
        self.config, self.task = config, task or open_task(config, config.slm)
        self.session = Session.open(config, config.strategy_names, config.adapter, config.batch_size)
        _warm_up(self.session)

    def shard(self, job: tuple[Strategy, int, Sequence[Problem]]) -> dict[str, Any]:
        """Results and traces of one strategy on one shard, the seconds they took, and the models' names and sizes."""
        strategy, index, problems = job
        session = self.session
        samples = self.config.num_samples if strategy.name == "self-consistency" else 1
        requests = requests_for(session, self.task, problems, samples, self.config.system)
        start = time.perf_counter()
        traced = self._num_traced(index) if samples == 1 else 0
        done = session.run(
            strategy, requests, self.config.max_new_tokens, keep_steps=traced > 0, trace=False, stop=self.config.stop
        )
        seconds = time.perf_counter() - start
        results = [
            self._grade(session, strategy, problem, done[i * samples : (i + 1) * samples])
            for i, problem in enumerate(problems)
        ]
        return {
            "seconds": seconds,
            "results": [asdict(result) for result in results],
            "traces": [_compact(t) for t in self._traces(strategy, problems[:traced], requests, done, results)],
            "pair": _pair(session),
        }

    def _grade(self, session: Session, strategy: Strategy, problem: Problem, samples: Sequence[Generated]) -> Result:
        texts = [session.text(sample, self.config.stop, strategy.name) for sample in samples]
        grades = [self.task.grade(problem, text) for text in texts]
        winner = 0
        if len(samples) > 1:
            answers = [self.task.canonical(grade.extracted) for grade in grades]
            winner = answers.index(vote(answers))
        cost = sum((sample.cost for sample in samples), Cost())
        return Result(
            problem_id=problem.problem_id,
            template=problem.template,
            strategy=strategy.name,
            is_correct=grades[winner].is_correct,
            extracted=grades[winner].extracted,
            gold=problem.answer,
            text=texts[winner],
            cost=cost,
            num_triggered=sum(sample.num_triggered for sample in samples),
            num_flips=sum(sample.num_flips for sample in samples),
            finish_reason=samples[winner].finish_reason,
            num_samples=len(samples),
            num_correct_samples=sum(grade.is_correct for grade in grades) if len(samples) > 1 else None,
        )

    def _num_traced(self, shard: int) -> int:
        """How many of a shard's problems are among the run's first `num_traces`."""
        return max(0, self.config.num_traces - shard * self.config.shard_size)

    def _traces(
        self,
        strategy: Strategy,
        problems: Sequence[Problem],
        requests: Sequence[Request],
        done: Sequence[Generated],
        results: Sequence[Result],
    ) -> list[dict[str, Any]]:
        texts = TokenTexts(self.session.tokenizer_of(strategy.name))
        labels = self._labels(strategy, requests[: len(problems)], done[: len(problems)])
        return [
            {
                "problem_id": problem.problem_id,
                "question": problem.question,
                "gold": problem.answer,
                "strategy": strategy.name,
                "is_correct": result.is_correct,
                "extracted": result.extracted,
                "prompt_text": self.task.prompt(problem),
                "steps": [trace_step(texts, step, found) for step in sequence.steps],
            }
            for problem, result, sequence, found in zip(problems, results, done, labels, strict=False)
        ]

    def _labels(
        self, strategy: Strategy, requests: Sequence[Request], done: Sequence[Generated]
    ) -> list[Labels] | list[None]:
        """What both models say of the written tokens; None where no LLM is loaded or it has tokens of its own."""
        session, config = self.session, self.config
        if session.llm is None or session.vocabulary is not None or not requests:
            return [None] * len(requests)
        written = [sequence.token_ids for sequence in done]
        return session.label(requests, written, strategy.num_candidates, config.support_size, config.divergence)


class TokenTexts(dict[int, str]):
    """The text of every token id, decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        return self.setdefault(token_id, str(self.tokenizer.decode([token_id])))


def trace_step(texts: Mapping[int, str], step: Step, labels: Labels | None = None) -> dict[str, Any]:
    """A step as the trace page shows it; what is false or not known is left out.

    Candidates stand where the step triggered and, with `labels`, where the LLM would have written another token than
    the SLM's greedy one.
    """
    found: dict[str, Any] = {"token_id": step.token_id, "text": texts[step.token_id]}
    if step.greedy_id != step.token_id:
        found |= {"greedy_id": step.greedy_id, "greedy_text": texts[step.greedy_id]}
    found |= {key: True for key, is_so in (("fired", step.fired), ("flip", step.flip and step.fired)) if is_so}
    if step.value is not None:
        found["value"] = _short(step.value)
    if labels is not None:
        found["divergence"] = _short(labels.divergence[step.index])
    if candidates := _trace_candidates(texts, step, labels):
        found["candidates"] = candidates
    return found


def _trace_candidates(texts: Mapping[int, str], step: Step, labels: Labels | None) -> list[dict[str, Any]]:
    llm: dict[int, float] = {}
    ids, logprobs = (step.candidates.ids, step.candidates.logprobs) if step.candidates is not None else ((), ())
    if labels is not None:
        row = labels.candidate_ids[step.index].tolist()
        llm = dict(zip(row, labels.llm_probs[step.index].tolist(), strict=True))
        if not ids and labels.rank[step.index] > 0:
            ids, logprobs = row, labels.slm_logprobs[step.index].tolist()
    if step.llm_probs is not None:
        llm = dict(zip(ids, step.llm_probs, strict=True))
    scores = step.scores or (None,) * len(ids)
    return [
        {
            "id": token_id,
            "text": texts[token_id],
            "slm_prob": _short(np.exp(logprob)),
            "llm_prob": _short(llm.get(token_id)),
            "score": _short(score),
            "selected": token_id == step.token_id,
        }
        for token_id, logprob, score in zip(ids, logprobs, scores, strict=True)
    ]


def _short(value: float | None) -> float | None:
    """Four significant digits: enough to look at."""
    return None if value is None else float(f"{value:.4g}")


def _pair(session: Session) -> dict[str, Any]:
    slm, llm = session.slm, session.llm
    return {
        "slm": slm.name,
        "llm": llm.name if llm is not None else None,
        "slm_params": slm.num_params,
        "llm_params": llm.num_params if llm is not None else None,
    }


def _warm_up(session: Session) -> None:
    """One short batch before the clock starts, so that no strategy pays for the libraries' first call."""
    request = requests_for_warm_up(session)
    session.run(Strategy("greedy", build_strategy("greedy", EvalConfig(), {}).trigger), request, 4)


def requests_for_warm_up(session: Session) -> list[Any]:
    return [session.request(0, "1 + 1 =")]


def _read_results(run: RunFolder, name: str) -> tuple[list[dict[str, Any]], float]:
    results, seconds = [], 0.0
    for path in run.shards(f"results-{name}", "json"):
        shard = read_json(path)
        results += shard["results"]
        seconds += shard["seconds"]
    return results, seconds


def _trace_lines(run: RunFolder, names: Sequence[str]) -> Iterator[str]:
    """The traces of all strategies, one shard in memory at a time."""
    for name in names:
        for path in run.shards(f"results-{name}", "json"):
            yield from read_json(path)["traces"]


def _summary(
    config: EvalConfig,
    run: RunFolder,
    task: Task,
    problems: Sequence[Problem],
    results: Mapping[str, tuple[list[dict[str, Any]], float]],
    adapter: AdapterConfig | None,
) -> dict[str, Any]:
    rows = {name: found[0] for name, found in results.items()}
    seconds = {name: found[1] for name, found in results.items()}
    held = set(adapter.heldout_templates) if adapter is not None else set()
    if not held:
        held = set(heldout_templates(task.templates(), config.heldout_templates))
    summary = {
        "task": config.task,
        "split": config.split,
        "seed": config.seed,
        "num_test": len(problems),
        "pair": read_json(run.file("pair.json")),
        "sufficiency": None,
        **_section(rows, seconds, config.seed),
        "gap_closed": _gap_closed(rows),
    }
    for title, is_held in (("seen_templates", False), ("unseen_templates", True)):
        part = {name: [r for r in found if (r["template"] in held) == is_held] for name, found in rows.items()}
        if held and all(part.values()):
            count = len(next(iter(part.values())))
            summary[title] = {
                "num_problems": count,
                **_section(part, None, config.seed),
                "gap_closed": _gap_closed(part),
            }
    return summary


def _section(
    rows: Mapping[str, list[dict[str, Any]]], seconds: Mapping[str, float] | None, seed: int
) -> dict[str, Any]:
    strategies = {name: _scores(found, None if seconds is None else seconds[name]) for name, found in rows.items()}
    paired = {}
    for left, right in _pairs(tuple(rows)):
        correct = [np.array([r["is_correct"] for r in rows[name]]) for name in (left, right)]
        paired[f"{left} vs {right}"] = paired_comparison(*correct, seed=seed)
    return {"strategies": strategies, "paired": paired}


def _pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """s2t-local against every other strategy, and every other strategy against greedy."""
    pairs = [("s2t-local", name) for name in names if name != "s2t-local"] if "s2t-local" in names else []
    if "greedy" in names:
        pairs += [(name, "greedy") for name in names if name not in ("greedy", "s2t-local")]
    if "s2t" in names and "takeover" in names:
        pairs.append(("s2t", "takeover"))
    return pairs


def _scores(results: Sequence[Mapping[str, Any]], seconds: float | None) -> dict[str, Any]:
    correct = np.array([r["is_correct"] for r in results], dtype=float)
    generated = sum(r["cost"]["generated"] for r in results)
    name = results[0]["strategy"]
    llm_tokens = generated if name in NEEDS_LLM else 0
    scores = {
        "accuracy": float(correct.mean()),
        "ci95": list(bootstrap_interval(correct)),
        "num_problems": len(results),
        "slm_tokens": 0 if name == "llm" else generated,
        "llm_tokens": llm_tokens,
        **{key: sum(r["cost"][key] for r in results) for key in _COSTS},
        "trigger_rate": sum(r["num_triggered"] for r in results) / max(generated, 1),
        "flip_rate": sum(r["num_flips"] for r in results) / max(generated, 1),
        "seconds": seconds,
    }
    if results[0]["num_correct_samples"] is not None:
        scores["num_samples"] = results[0]["num_samples"]
        scores["pass_at_n"] = float(np.mean([r["num_correct_samples"] > 0 for r in results]))
    return scores


def _gap_closed(rows: Mapping[str, list[dict[str, Any]]]) -> float | None:
    """Share of the way from greedy to collaborative S2T that s2t-local goes; None where it is not defined."""
    if not {"greedy", "s2t", "s2t-local"} <= rows.keys():
        return None
    accuracy = {name: np.mean([r["is_correct"] for r in rows[name]]) for name in ("greedy", "s2t", "s2t-local")}
    gap = accuracy["s2t"] - accuracy["greedy"]
    return float((accuracy["s2t-local"] - accuracy["greedy"]) / gap) if gap > 0 else None
