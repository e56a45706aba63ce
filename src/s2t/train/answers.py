"""Answers to learn from: whose they are depends on the method, and so does what the LLM says beside them.

A shard's row is one answer in the SLM's tokens: the LLM's (`sft`, `kd`) or the SLM's own (`on-policy-kd`), and for the two
latter the LLM's likeliest tokens at every step with their probabilities and that of the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s2t.config import DecodeConfig, DistillConfig
from s2t.decode.label import Targets, llm_targets
from s2t.decode.opening import open_pair
from s2t.decode.workload import check_shards, open_task, requests_for, shards_of, task_for_workers
from s2t.errors import ConfigError, DataError, ModelError
from s2t.files import RunFolder, read_tables, write_table
from s2t.methods.strategies import build_strategy
from s2t.progress import counted_as
from s2t.records import Generated, Problem, Request
from s2t.scale import Shard, open_workers, to_files, write_missing
from s2t.tasks.problems import Task
from s2t.train.processes import Processes

SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("template", pa.string()),
        ("is_correct", pa.bool_()),  # null unless only correct answers are wanted
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("target_ids", pa.list_(pa.int32())),  # [T * S], step by step; empty for sft
        ("target_probs", pa.list_(pa.float32())),  # [T * (S + 1)], the rest behind each step's S
    ]
)
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, slots=True)
class TrainingAnswer:
    """One answer of T tokens to a prompt of P, and what the LLM gives to its S likeliest tokens at each (no sft)."""

    problem_id: str
    prompt_ids: np.ndarray  # [P]
    token_ids: np.ndarray  # [T]
    target_ids: np.ndarray  # [T, S]
    target_probs: np.ndarray  # [T, S + 1], the last one of all other tokens

    @property
    def ids(self) -> np.ndarray:
        """Every token that some token of the answer is predicted from."""
        return np.concatenate([self.prompt_ids, self.token_ids[:-1]])


def write_answers(
    config: DistillConfig, run: RunFolder, task: Task, problems: Sequence[Problem], processes: Processes
) -> None:
    """Write every shard that is not in the run folder yet; models are loaded only when one is missing.

    Of several processes each writes every n-th shard, and waits for those of the others.
    """
    parts = shards_of(problems, config.shard_size)
    check_shards(run, "answers", "parquet", parts)
    shards = to_files(parts, lambda i: run.shard("answers", i, "parquet"))
    if processes.count > 1 and (config.workers > 1 or config.ray is not None):
        raise ConfigError("the processes of the launcher write the answers; leave --workers and --ray out.")
    with open_workers(partial(_Writer, config, task_for_workers(task, config)), config) as workers:
        own = shards[processes.index :: processes.count]
        write_missing(workers, _Writer.shard, own, write_table, "answers", processes.is_first)
    while not all(shard.path.exists() for shard in shards):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


class _Writer:
    """Writes the answers of a shard and reads them with the LLM where the method needs it."""

    def __init__(self, config: DistillConfig, task: Task | None) -> None:
        self.config, self.task = config, task or open_task(config, config.slm, config.revision)
        self.writer = config.policy if config.method == "on-policy-kd" else "llm"
        self.pair = open_pair(config, [self.writer], with_llm=True)
        if config.method != "sft" and self.pair.vocabulary is not None:
            raise ModelError(
                f"method {config.method} compares next-token distributions, and {config.slm} and {config.llm} have "
                "different tokenizers; use --method sft."
            )
        decode = DecodeConfig(temperature=config.temperature, top_p=1.0)
        self.strategy = build_strategy(self.writer, decode, {}, seed=config.seed)

    def shard(self, shard: Shard[Problem]) -> pa.Table:
        """One shard's table: write, grade, read with the LLM, pack."""
        problems = shard.items
        requests = requests_for(self.pair, self.task, problems)
        with counted_as(1 if self.config.method == "sft" else 1 / 2):  # written, and read
            done = self.pair.write(self.strategy, requests, self.config.max_new_tokens)
            answers = [self._in_slm_tokens(sequence) for sequence in done]
            rows = [self._row(*row) for row in zip(problems, requests, done, answers, strict=True)]
            for row, targets in zip(rows, self._targets(requests, answers), strict=True):
                row.update(target_ids=targets.ids.ravel(), target_probs=targets.probs.ravel())
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _in_slm_tokens(self, sequence: Generated) -> list[int]:
        """An answer's ids; one of an LLM with other tokens is encoded again, with the SLM's own stop id behind it."""
        vocabulary = self.pair.vocabulary
        if vocabulary is None or self.writer != "llm":
            return sequence.token_ids
        [ids] = vocabulary.slm_codec.encode([self.pair.text(sequence, strategy="llm").encode()])
        has_end = sequence.finish_reason == "stop" and vocabulary.stop_id is not None
        return [*ids, *([vocabulary.stop_id] if has_end else [])]  # type: ignore[list-item]

    def _row(self, problem: Problem, request: Request, sequence: Generated, answer: list[int]) -> dict[str, Any]:
        is_correct = None
        if self.config.only_correct:
            text = self.pair.text(sequence, strategy=self.writer)
            is_correct = self.task.grade(problem, text).is_correct
        return {
            "problem_id": problem.problem_id,
            "template": problem.template,
            "is_correct": is_correct,
            "prompt_ids": list(request.prompt_ids),
            "token_ids": answer,
        }

    def _targets(self, requests: Sequence[Request], answers: Sequence[Sequence[int]]) -> list[Targets]:
        config = self.config
        if config.method == "sft":
            return [Targets(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)) for _ in answers]
        prompts = [request.prompt_ids for request in requests]
        return llm_targets(
            self.pair.slm, self.pair.local_llm(), prompts, answers, config.support_size, config.kd_temperature
        )


def read_answers(run: RunFolder) -> list[TrainingAnswer]:
    """Every answer to be trained on, in order: not the wrong ones where only correct ones are wanted, nor empty ones.

    Raises DataError where none is left.
    """
    answers = [answer for path in run.shards("answers", "parquet") for answer in _read_shard(path)]
    if not answers:
        raise DataError("no answer is left to train on; take more problems, or leave --only-correct out.")
    return answers


def _read_shard(path: Path) -> Iterator[TrainingAnswer]:
    table = read_tables([path])
    lists = [_lists(table[name]) for name in ("prompt_ids", "token_ids", "target_ids", "target_probs")]
    names, verdicts = table["problem_id"].to_pylist(), table["is_correct"].to_pylist()
    for name, is_correct, prompt, tokens, ids, probs in zip(names, verdicts, *lists, strict=True):
        if is_correct is not False and len(tokens):
            count = len(tokens)
            yield TrainingAnswer(name, prompt, tokens, ids.reshape(count, -1), probs.reshape(count, -1))


def _lists(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """The lists of a column as views of its memory."""
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_pylist()
        yield from (values[start:end] for start, end in pairwise(offsets))
