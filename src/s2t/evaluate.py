"""Problems x strategies to graded results, which `summary` turns into accuracies, intervals, tests and costs.

Work is cut into shards of problems per strategy; a killed run resumes by shard. Adapters refuse test problems
they were trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from s2t.combine import combine
from s2t.config import HOW_IT_RUNS, MANY_SAMPLES, METHODS, NEEDS_LLM, OVER_ANSWERS, EvalConfig
from s2t.decode.label import Labels
from s2t.decode.opening import check_needs, open_pair
from s2t.decode.pair import Pair
from s2t.decode.workload import (
    ServerReport,
    check_shards,
    open_task,
    requests_for,
    shard_workers,
    shards_of,
    strategy_of,
    task_for_workers,
)
from s2t.errors import ConfigError
from s2t.files import RunFolder, read_json, write_json, write_lines, write_text
from s2t.methods.sample import choose_sample
from s2t.methods.strategies import Strategy, build_strategy
from s2t.model.adapter import AdapterConfig, selector_config, selector_problems
from s2t.model.card import EVAL_FILE, measured, with_accuracy
from s2t.progress import counted_as
from s2t.records import Cost, Generated, Grade, Problem, Request, Result
from s2t.scale import Shard, to_files, write_missing
from s2t.summary import Run, summarize
from s2t.tasks.problems import Task, check_disjoint
from s2t.traces import TokenTexts, trace_steps

_NUM_TRACES, _A_HANDFUL = 32, 5


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run all strategies and return summary.json; writes results.jsonl, traces.jsonl and the shards they come from."""
    names = config.strategy_names
    check_needs(config, names)
    if config.card and not Path(str(config.adapter)).is_dir():
        raise ConfigError(f"--card writes into the adapter's folder, and {config.adapter} is none; leave it out.")
    adapter = selector_config(config.adapter, config.slm, config.revision)
    run = RunFolder.open(config.out, "eval", config, ignore=(*HOW_IT_RUNS, "card"))
    task = open_task(config, config.slm, config.revision)
    task.check_gradable()
    problems = task.problems(config.split, config.limit, config.seed)
    trained = selector_problems(config.adapter, config.slm, config.revision)
    check_disjoint(problems, trained, f"the {config.split} problems and the adapter's")
    contestants = _contestants(config, adapter)
    _run_missing(config, run, task, problems, contestants)
    found = {one.shards: _read_results(run, one) for one in contestants}
    results = {name: [found[one.shards] for one in contestants if one.name == name] for name in names}
    for name in filter(OVER_ANSWERS.__contains__, names):
        results[name] = combine(name, config, task, problems, results)
        found |= {f"{name}-{seed}": own for seed, own in enumerate(results[name])}
    server = ServerReport(run, _servers(config)).section()
    summary = summarize(config, task, problems, results, adapter, read_json(run.file("pair.json")), server)
    write_text(run.file("results.jsonl"), "".join(_line(r) for each in found.values() for r in each[0]))
    if not run.is_complete or not run.file("traces.jsonl").exists():  # they follow from the shards alone
        write_lines(run.file("traces.jsonl"), _trace_lines(run, contestants))
    write_json(run.file("summary.json"), summary)
    run.finish()
    if config.card and config.adapter is not None:
        _write_card(Path(config.adapter), summary)
    return summary


def _write_card(folder: Path, summary: dict[str, Any]) -> None:
    """The accuracies into the adapter's folder, for its readers and for `s2t merge`."""
    card = folder / "README.md"
    found = measured(summary)
    write_json(folder / EVAL_FILE, found)
    write_text(card, with_accuracy(card.read_text(encoding="utf-8") if card.is_file() else "", found))


@dataclass(frozen=True, slots=True)
class _Contestant:
    """A strategy under one name (`s2t@entropy`) and one seed."""

    name: str
    strategy: Strategy
    seed: int
    is_first: bool

    @property
    def shards(self) -> str:
        """What its shard files are called."""
        return f"results-{self.name}" if self.is_first else f"results-{self.name}-seed{self.seed}"

    @property
    def voter(self) -> _Contestant:
        """The majority vote over the samples that self-certainty draws: the same ones, drawn once for both."""
        return replace(self, name="self-consistency", strategy=replace(self.strategy, name="self-consistency"))


def _contestants(config: EvalConfig, adapter: AdapterConfig | None) -> list[_Contestant]:
    """Every strategy once, and those that draw at random once per seed; raises ConfigError for what does not fit."""
    made = []
    for name in config.strategy_names:
        if name in OVER_ANSWERS:
            continue
        base, _, trigger = name.partition("@")
        settings = replace(config, trigger=trigger or config.trigger)
        for seed in range(config.seed, config.seed + config.num_seeds):
            strategy = strategy_of(base, settings, adapter, seed)
            made.append(_Contestant(name, strategy, seed, seed == config.seed))
            if strategy.sampling is None and not strategy.trigger.is_random:
                break
    return made


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _compact(trace: Mapping[str, Any]) -> str:
    return json.dumps(trace, ensure_ascii=False, separators=(",", ":"))


def _run_missing(
    config: EvalConfig, run: RunFolder, task: Task, problems: Sequence[Problem], contestants: Sequence[_Contestant]
) -> None:
    """Decode and grade every shard that is not on disk yet; models are loaded only when one is missing."""

    def write(judges: Sequence[_Contestant], path: Path, result: dict[str, Any]) -> None:
        if not run.file("pair.json").exists():
            write_json(run.file("pair.json"), result["pair"])
        servers.add(result["report"])
        paths = [run.shard(judge.shards, result["index"], "json") for judge in judges]
        assert paths[-1] == path, "the file that says a shard is done comes last"
        for place, found in zip(paths, result["found"], strict=True):
            write_json(place, found)

    servers = ServerReport(run, _servers(config))
    parts = shards_of(problems, config.shard_size)
    for one in contestants:
        check_shards(run, one.shards, "json", parts)
    judged_twice = {"self-consistency", "self-certainty"} <= set(config.strategy_names)
    with shard_workers(partial(_Evaluator, config, task_for_workers(task, config)), config) as workers:
        for one in contestants:
            if judged_twice and one.name == "self-consistency":
                continue  # written with self-certainty, whose samples it judges
            judges = [one, one.voter] if judged_twice and one.name == "self-certainty" else [one]
            shards = to_files(parts, partial(run.shard, judges[-1].shards, suffix="json"))
            title = one.name if one.is_first else f"{one.name}, seed {one.seed}"
            work = partial(_Evaluator.shard, judges=judges, num_traces=_num_traces(config, len(problems)))
            write_missing(workers, work, shards, partial(write, judges), title)


def _num_traces(config: EvalConfig, num_problems: int) -> int:
    """How many problems are traced: where an LLM reads each again with the SLM, which costs more than writing it, one in a
    hundred, and a handful at least."""
    if config.num_traces is not None:
        return config.num_traces
    is_read = any(name.partition("@")[0] in NEEDS_LLM for name in config.strategy_names)
    return max(_A_HANDFUL, min(_NUM_TRACES, num_problems // 100)) if is_read else _NUM_TRACES


def _servers(config: EvalConfig) -> str:
    return "slm_server" if config.slm_urls else "llm_server"


class _Evaluator:
    """Decodes and grades shards; the models are loaded and warm."""

    def __init__(self, config: EvalConfig, task: Task | None) -> None:
        self.config, self.task = config, task or open_task(config, config.slm, config.revision)
        self.pair = open_pair(config, config.strategy_names)
        _warm_up(self.pair)

    def shard(self, shard: Shard[Problem], judges: Sequence[_Contestant], num_traces: int) -> dict[str, Any]:
        """What one strategy wrote for a shard: per judge of its answers the results, traces and seconds; the models' names and
        sizes, and what asking servers took."""
        one, problems = judges[0], shard.items
        pair, strategy = self.pair, one.strategy
        samples = self.config.num_samples if strategy.name in MANY_SAMPLES else 1
        requests = requests_for(pair, self.task, problems, samples, self.config.system)
        start = time.perf_counter()
        traced = max(0, num_traces - shard.index * self.config.shard_size) if samples == 1 and one.is_first else 0
        with counted_as(1 / samples):
            done = pair.write(
                strategy,
                requests,
                self.config.max_new_tokens,
                keep_steps=traced > 0,
                trace=False,
                stop=self.config.stop,
            )
        seconds = time.perf_counter() - start
        answers = [done[i * samples : (i + 1) * samples] for i in range(len(problems))]
        texts = [[pair.text(sample, self.config.stop, strategy.name) for sample in row] for row in answers]
        grades = [[self.task.grade(p, text) for text in row] for p, row in zip(problems, texts, strict=True)]
        found = []
        for judge in judges:
            rows = zip(problems, answers, texts, grades, strict=True)
            results = [self._result(judge, *row) for row in rows]
            traces = self._traces(judge, problems[:traced], requests, done, results)
            found.append(
                {
                    "seconds": seconds,
                    "results": [asdict(result) for result in results],
                    "traces": [_compact(trace) for trace in traces],
                }
            )
        return {"index": shard.index, "pair": _names_and_sizes(pair), "report": pair.take_report(), "found": found}

    def _result(
        self,
        one: _Contestant,
        problem: Problem,
        samples: Sequence[Generated],
        texts: Sequence[str],
        grades: Sequence[Grade],
    ) -> Result:
        answers = [self.task.canonical(grade.extracted) for grade in grades]
        certainties = [sample.mean_value for sample in samples]
        winner = choose_sample(one.strategy.name, answers, certainties)
        cost = sum((sample.cost for sample in samples), Cost())
        votes = None
        if METHODS[one.strategy.name].samples:
            sure = certainties if one.strategy.name == "self-certainty" else [None] * len(samples)
            votes = [
                {"answer": answer, "is_correct": grade.is_correct, "certainty": certainty, "tokens": len(own.token_ids)}
                for answer, grade, certainty, own in zip(answers, grades, sure, samples, strict=True)
            ]
            if samples[0].notes:
                votes = [
                    vote
                    | {"expected": own.last_value, "forecasts": [[round(p, 5) for p in note] for note in own.notes]}
                    for vote, own in zip(votes, samples, strict=True)
                ]
        return Result(
            problem_id=problem.problem_id,
            template=problem.template,
            strategy=one.name,
            is_correct=grades[winner].is_correct,
            extracted=grades[winner].extracted,
            gold=problem.answer,
            text=texts[winner],
            cost=cost,
            num_triggered=sum(sample.num_triggered for sample in samples),
            num_flips=sum(sample.num_flips for sample in samples),
            finish_reason=samples[winner].finish_reason,
            num_samples=len(samples),
            num_correct_samples=None
            if votes is None and len(samples) == 1
            else sum(grade.is_correct for grade in grades),
            seed=one.seed,
            samples=votes,
            value=samples[winner].mean_value if METHODS[one.strategy.name].reads is not None else None,
        )

    def _traces(
        self,
        one: _Contestant,
        problems: Sequence[Problem],
        requests: Sequence[Request],
        done: Sequence[Generated],
        results: Sequence[Result],
    ) -> list[dict[str, Any]]:
        strategy = one.strategy
        texts = TokenTexts(self.pair.tokenizer_of(strategy.name))
        labels = self._labels(strategy, requests[: len(problems)], done[: len(problems)])
        return [
            {
                "problem_id": problem.problem_id,
                "question": problem.question,
                "gold": problem.answer,
                "strategy": one.name,
                "is_correct": result.is_correct,
                "extracted": result.extracted,
                "prompt_text": self.task.prompt(problem),
                "steps": trace_steps(texts, sequence.steps, found),
            }
            for problem, result, sequence, found in zip(problems, results, done, labels, strict=False)
        ]

    def _labels(
        self, strategy: Strategy, requests: Sequence[Request], done: Sequence[Generated]
    ) -> list[Labels] | list[None]:
        """What both models say of the written tokens; None where no LLM is loaded or it has tokens of its own."""
        pair, config = self.pair, self.config
        if pair.llm is None or not pair.has_one_tokenizer or not requests:
            return [None] * len(requests)
        written = [sequence.token_ids for sequence in done]
        fired = [[step.index for step in sequence.steps if step.fired] for sequence in done]
        settings = (strategy.num_candidates, config.support_size, config.divergence, config.support)
        with counted_as(0):
            return pair.label(requests, written, *settings, exact_at=lambda i, own: _shown(fired[i], own))


def _shown(fired: Sequence[int], labels: Labels) -> list[int]:
    """The steps whose candidates the trace page shows."""
    return sorted({*fired, *np.flatnonzero(labels.rank > 0).tolist()})


def _names_and_sizes(pair: Pair) -> dict[str, Any]:
    slm, llm = pair.slm, pair.llm
    return {
        "slm": slm.name,
        "llm": llm.name if llm is not None else None,
        "slm_params": slm.num_params,
        "llm_params": llm.num_params if llm is not None else None,
    }


def _warm_up(pair: Pair) -> None:
    """One short batch before the clock starts, so that no strategy pays for the libraries' first call."""
    with counted_as(0):
        pair.write(build_strategy("greedy", EvalConfig(), {}), [pair.request(0, "1 + 1 =")], 4)


def _read_results(run: RunFolder, one: _Contestant) -> Run:
    results, seconds = [], 0.0
    for path in run.shards(one.shards, "json"):
        shard = read_json(path)
        results += shard["results"]
        seconds += shard["seconds"]
    return results, seconds


def _trace_lines(run: RunFolder, contestants: Sequence[_Contestant]) -> Iterator[str]:
    """The traces of all strategies under their first seed, one shard in memory at a time."""
    for one in contestants:
        if one.is_first:
            for path in run.shards(one.shards, "json"):
                yield from read_json(path)["traces"]
