"""Problems to selection groups: trajectories of a policy, labelled by both models, in resumable parquet shards.

A shard's row is one trajectory with its prompt, tokens, divergence at every step (criticality learns from
all of them) and its groups: candidates, SLM log-probabilities and absolute LLM probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s2t.config import HOW_IT_RUNS, NEEDS_LLM, CollectConfig, DecodeConfig
from s2t.decode.label import Labels
from s2t.decode.opening import check_needs, open_pair
from s2t.decode.workload import (
    ServerReport,
    check_shards,
    open_task,
    problems_outside,
    read_thresholds,
    requests_for,
    shard_workers,
    shards_of,
    strategy_of,
    task_for_workers,
)
from s2t.errors import ConfigError, DataError
from s2t.files import MANIFEST, RunFolder, read_json, read_tables, write_json, write_table
from s2t.methods.strategies import Strategy
from s2t.progress import counted_as
from s2t.records import Problem, Provenance, SelectionGroup
from s2t.scale import Shard, to_files, write_missing
from s2t.shards import check_whole
from s2t.tasks.problems import Task, heldout_templates

_LISTS = {
    "prompt_ids": pa.int32(),
    "token_ids": pa.int32(),
    "divergence": pa.float32(),
    "group_steps": pa.int32(),
    "candidate_ids": pa.int32(),  # [G * K], group by group
    "slm_logprobs": pa.float32(),  # [G * K]
    "llm_probs": pa.float32(),  # [G * K]
}
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("task", "split", "problem_id", "template", "policy", "pair")),
        ("seed", pa.int64()),
        ("num_candidates", pa.int32()),
        *((name, pa.list_(kind)) for name, kind in _LISTS.items()),
    ]
)


def collect(config: CollectConfig) -> dict[str, Any]:
    """Collect groups and return their counts (also collect.json); a killed run resumes by shard, without loss or duplicates."""
    threshold = _threshold(config)
    check_needs(config, [config.policy], with_llm=True)
    run = RunFolder.open(config.out, "collect", config, ignore=HOW_IT_RUNS)
    task = open_task(config, config.slm, config.revision)
    heldout = heldout_templates(task.templates(), config.heldout_templates)
    problems = problems_outside(task, config.split, config.limit, config.seed, heldout)
    parts = shards_of(problems, config.shard_size)
    check_shards(run, "groups", "parquet", parts)
    shards = to_files(parts, lambda i: run.shard("groups", i, "parquet"))
    servers = ServerReport(run)
    with shard_workers(partial(_Collector, config, task_for_workers(task, config), threshold), config) as workers:
        write_missing(workers, _Collector.shard, shards, servers.beside(write_table), "collect")
    result = _counts(run, len(problems), threshold, heldout) | servers.section()
    write_json(run.file("collect.json"), result)
    run.finish()
    return result


def _threshold(config: CollectConfig) -> float:
    if config.threshold is not None:
        return config.threshold
    thresholds = read_thresholds(config.calibration)
    if "divergence" not in thresholds:
        raise ConfigError("collect needs a divergence threshold; pass --calibration calibration.json or --threshold.")
    return thresholds["divergence"]


class _Collector:
    """Writes trajectories with the policy and turns them into rows."""

    def __init__(self, config: CollectConfig, task: Task | None, threshold: float) -> None:
        self.config, self.threshold = config, threshold
        self.task = task or open_task(config, config.slm, config.revision)
        self.pair = open_pair(config, [config.policy], with_llm=True)
        assert self.pair.llm is not None
        self.fingerprints = f"{self.pair.slm.fingerprint}/{self.pair.llm.fingerprint}"
        self.strategy = self._policy()

    def _policy(self) -> Strategy:
        config = self.config
        decode = DecodeConfig(
            temperature=config.temperature,
            top_p=1.0,
            support_size=config.support_size,
            support=config.support,
            divergence=config.divergence,
            warmup_steps=config.warmup_steps,
            threshold=self.threshold if config.policy in NEEDS_LLM else None,
        )
        return strategy_of(config.policy, decode, self.pair.selector_config, config.seed)

    def shard(self, shard: Shard[Problem]) -> tuple[pa.Table, dict[str, Any] | None]:
        """One shard's table (write, label, pack), and what asking servers took."""
        config, pair, problems = self.config, self.pair, shard.items
        requests = requests_for(pair, self.task, problems)
        with counted_as(1 / 2):  # written, then read
            done = pair.write(self.strategy, requests, config.max_new_tokens)
            prompts, generated = [r.prompt_ids for r in requests], [s.token_ids for s in done]
            labels = pair.label(
                requests,
                generated,
                config.num_candidates,
                config.support_size,
                config.divergence,
                config.support,
                exact_at=lambda _, found: self._chosen(found),
            )
        rows = [self._row(*row) for row in zip(problems, prompts, generated, labels, strict=True)]
        return pa.Table.from_pylist(rows, schema=SCHEMA), pair.take_report()

    def _chosen(self, labels: Labels) -> np.ndarray:
        """The steps that become groups."""
        steps = np.arange(len(labels.divergence))
        return np.flatnonzero((labels.divergence > self.threshold) & (steps >= self.config.warmup_steps))

    def _row(self, problem: Problem, prompt: Sequence[int], tokens: list[int], labels: Labels) -> dict[str, Any]:
        chosen = self._chosen(labels)
        return {
            "task": self.task.name,
            "split": self.config.split,
            "problem_id": problem.problem_id,
            "template": problem.template,
            "policy": self.config.policy,
            "pair": self.fingerprints,
            "seed": self.config.seed,
            "num_candidates": labels.candidate_ids.shape[1],
            "prompt_ids": list(prompt),
            "token_ids": tokens,
            "divergence": labels.divergence,
            "group_steps": chosen,
            "candidate_ids": labels.candidate_ids[chosen].ravel(),
            "slm_logprobs": labels.slm_logprobs[chosen].ravel(),
            "llm_probs": labels.llm_probs[chosen].ravel(),
        }


def _counts(run: RunFolder, num_problems: int, threshold: float, heldout: frozenset[str]) -> dict[str, Any]:
    table = read_tables(run.shards("groups", "parquet"), ["token_ids", "group_steps"])
    num_steps = sum(map(len, table["token_ids"].to_pylist()))
    num_groups = sum(map(len, table["group_steps"].to_pylist()))
    return {
        "num_problems": num_problems,
        "num_groups": num_groups,
        "num_steps": num_steps,
        "trigger_rate": num_groups / max(num_steps, 1),
        "threshold": threshold,
        "heldout_templates": sorted(heldout),
        "shards": len(run.shards("groups", "parquet")),
    }


def read_groups(folder: str | Path) -> Iterator[SelectionGroup]:
    """Every selection group of a collected run, in order; raises DataError where there are none."""
    paths = sorted(Path(folder).glob("groups-*.parquet"))
    if (Path(folder) / MANIFEST).is_file():
        check_whole(Path(folder), read_json(Path(folder) / MANIFEST))
    if not paths:
        raise DataError(f"{folder} holds no groups-*.parquet; pass a folder written by `s2t collect`.")
    for path in paths:
        for row in read_tables([path]).to_pylist():
            yield from _groups_of(row)


def _groups_of(row: dict[str, Any]) -> Iterator[SelectionGroup]:
    k = row["num_candidates"]
    provenance = Provenance(
        *(row[name] for name in ("task", "split", "problem_id", "template", "policy", "pair", "seed"))
    )
    for place, step in enumerate(row["group_steps"]):
        part = slice(place * k, (place + 1) * k)
        yield SelectionGroup(
            prefix_ids=(*row["prompt_ids"], *row["token_ids"][:step]),
            candidate_ids=tuple(row["candidate_ids"][part]),
            slm_logprobs=tuple(row["slm_logprobs"][part]),
            llm_probs=tuple(row["llm_probs"][part]),
            divergence=row["divergence"][step],
            is_triggered=True,
            step=step,
            provenance=provenance,
        )
