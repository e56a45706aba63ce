"""Collecting: groups per second of labelling by prefill, against reading both models at every step of the same sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from s2t.bench.timing import Contestant
from s2t.config import BenchConfig, DecodeConfig, TaskConfig
from s2t.core.calibration import threshold_at
from s2t.decode.opening import open_pair
from s2t.decode.workload import open_task, requests_for
from s2t.methods.strategies import build_strategy
from s2t.records import Request

_STORED = 16  # candidates of a group


class CollectBench:
    """Greedy trajectories of the SLM on problems of the train split, labelled in both ways; `groups` holds what each found."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.pair = open_pair(config, ["s2t"])
        task = open_task(TaskConfig(task=config.task), config.slm)
        problems = task.problems("train", config.limit, config.seed)
        self.requests: list[Request] = requests_for(self.pair, task, problems)
        self.groups: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
        self.threshold = 0.0
        warm = self._by_prefill(self.requests[:64])
        values = np.concatenate([found for found, _ in warm])
        reading, _ = threshold_at(values, 1 - config.rates[-1])
        # between two readings: the two ways round differently, and a step at the threshold itself would be a group of one alone
        self.threshold = (reading + values[values > reading].min(initial=reading + 1)) / 2

    def contestants(self) -> dict[str, Contestant]:
        """Name -> what runs it once."""
        return {"step by step": self._run_steps, "prefill": self._run_prefill}

    def _run_prefill(self) -> Iterator[object]:
        self.groups["prefill"] = [
            (row, int(step), tuple(ids[step].tolist()))
            for row, (divergence, ids) in enumerate(self._by_prefill(self.requests))
            for step in np.flatnonzero(divergence > self.threshold)
        ]
        yield

    def _by_prefill(self, requests: list[Request]) -> list[tuple[np.ndarray, np.ndarray]]:
        pair = self.pair
        strategy = build_strategy("greedy", DecodeConfig(), {})
        written = [s.token_ids for s in pair.write(strategy, requests, self.config.max_new_tokens)]
        found = pair.label(requests, written, _STORED)
        return [(labels.divergence, labels.candidate_ids) for labels in found]

    def _run_steps(self) -> Iterator[object]:
        """The loop itself with the LLM read at every token, divergence and candidates kept at each, and nothing selected."""
        never = DecodeConfig(threshold=float("inf"), draft_tokens=1, num_candidates=_STORED)
        strategy = build_strategy("s2t", never, {})
        done = self.pair.write(strategy, self.requests, self.config.max_new_tokens, keep_steps=True)
        self.groups["step by step"] = [
            (row, step.index, step.candidates.ids)
            for row, sequence in enumerate(done)
            for step in sequence.steps
            if step.value is not None and step.candidates is not None and step.value > self.threshold
        ]
        yield

    def facts(self) -> dict[str, Any]:
        """Counts of the last round."""
        return {"num_problems": len(self.requests), "num_groups": {name: len(g) for name, g in self.groups.items()}}
