"""Selection groups to training batches: whole trajectories, so that one forward over a prefix serves all its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from s2t.errors import ConfigError, DataError
from s2t.files import load_run, read_json, read_tables


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One row of a groups shard; G groups of K candidates on T generated tokens."""

    problem_id: str
    template: str | None
    prompt_ids: np.ndarray  # [P]
    token_ids: np.ndarray  # [T]
    divergence: np.ndarray  # [T]
    group_steps: np.ndarray  # [G]
    candidate_ids: np.ndarray  # [G, K]
    slm_logprobs: np.ndarray  # [G, K]
    llm_probs: np.ndarray  # [G, K]

    @property
    def ids(self) -> np.ndarray:
        """Every token that some step is predicted from: prompt and generated, the last one left out."""
        return np.concatenate([self.prompt_ids, self.token_ids[:-1]])


@dataclass(frozen=True, slots=True)
class GroupData:
    """All trajectories of one or more collected runs, and what they were collected with."""

    trajectories: list[Trajectory]
    threshold: float
    warmup_steps: int
    task: str
    split: str
    slm: str
    llm: str
    pair: str
    heldout_templates: tuple[str, ...]
    """Templates that no trajectory has, whatever its task."""
    heldout_by_task: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of several tasks: the templates held out of each, since tasks may call theirs alike."""

    @property
    def num_groups(self) -> int:
        return sum(len(t.group_steps) for t in self.trajectories)


@dataclass(slots=True)
class Batch:
    """b trajectories, right-padded, and their N groups of K candidates, trajectory by trajectory."""

    ids: Tensor  # [b, T], or empty where the prefixes have been read already
    candidate_ids: Tensor  # [N, K]
    group_row: Tensor  # [N], the trajectory each group belongs to
    prefix_lengths: Tensor  # [N], tokens before the candidates
    last_ids: Tensor  # [N], the last of them
    slm_logprobs: Tensor  # [N, K]
    llm_probs: Tensor  # [N, K]
    step_index: Tensor  # [2, M]: (row, column) of the state each trained step is predicted from
    step_ids: Tensor  # [M], the token at that place
    is_critical: Tensor  # [M] bool


def read_group_data(folders: str, num_candidates: int) -> GroupData:
    """Load collected runs (comma-separated folders) of one pair and split; their tasks may differ.

    Raises DataError for a run that is not complete or does not fit, ConfigError when fewer than
    `num_candidates` candidates were stored.
    """
    parts = [_read_run(Path(name.strip()), num_candidates) for name in folders.split(",") if name.strip()]
    if not parts:
        raise ConfigError("train needs --groups, one or more folders written by `s2t collect`.")
    first = parts[0]
    for part in parts[1:]:
        _check_fits(first, part)
    by_task = _heldout_by_task(parts)
    return replace(
        first,
        trajectories=[t for part in parts for t in part.trajectories],
        task=";".join(by_task),
        heldout_templates=_heldout_everywhere(parts, by_task),
        heldout_by_task=by_task if len(by_task) > 1 else {},
    )


def _check_fits(first: GroupData, part: GroupData) -> None:
    """Raise DataError where two runs are of different pairs or splits, or differ in what counts as a divergence point."""
    if (part.pair, part.split) != (first.pair, first.split):
        raise DataError(
            f"the collected runs differ in pair or split: expected {first.pair}, {first.split}, got {part.pair}, "
            f"{part.split}; train on runs of one pair and split."
        )
    if (part.threshold, part.warmup_steps) != (first.threshold, first.warmup_steps):
        raise DataError(
            "the collected runs differ in what counts as a divergence point: expected threshold "
            f"{first.threshold} past {first.warmup_steps} steps, got {part.threshold} past {part.warmup_steps}; "
            "collect them with one calibration."
        )


def _heldout_by_task(parts: Sequence[GroupData]) -> dict[str, tuple[str, ...]]:
    """The templates that every run of a task held out, task by task."""
    found: dict[str, set[str]] = {}
    for part in parts:
        found[part.task] = found.get(part.task, set(part.heldout_templates)) & set(part.heldout_templates)
    return {task: tuple(sorted(held)) for task, held in found.items()}


def _heldout_everywhere(parts: Sequence[GroupData], by_task: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The templates held out of a task that no trajectory of another one has either."""
    trained = {t.template for part in parts for t in part.trajectories} if len(by_task) > 1 else set()
    return tuple(sorted({name for held in by_task.values() for name in held} - trained))


def _read_run(folder: Path, num_candidates: int) -> GroupData:
    manifest = load_run(folder, "collect")
    summary, config = read_json(folder / "collect.json"), manifest["config"]
    table = read_tables(sorted(folder.glob("groups-*.parquet")))
    rows = table.to_pylist()
    _check_rows(folder, rows, summary)
    stored = min((row["num_candidates"] for row in rows), default=0)
    if stored < num_candidates:
        raise ConfigError(
            f"num_candidates is {num_candidates} but {folder} stores {stored} a group; lower --num-candidates."
        )
    if summary["num_groups"] == 0:
        raise DataError(f"{folder} holds no selection group; collect more problems or lower the threshold.")
    return GroupData(
        [_trajectory(row, num_candidates) for row in rows],
        summary["threshold"],
        config["warmup_steps"],
        config["task"],
        config["split"],
        config["slm"],
        config["llm"],
        rows[0]["pair"],
        tuple(summary["heldout_templates"]),
    )


def _check_rows(folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Raise DataError unless these are the trajectories that were counted, one a problem."""
    wanted = summary.get("num_problems", len(rows))
    if len(rows) != wanted or len({row["problem_id"] for row in rows}) != wanted:
        raise DataError(
            f"{folder} holds {len(rows)} trajectories where s2t collect wrote {wanted}, one a problem: a shard is gone or "
            "doubled; run s2t collect again."
        )
    if len(pairs := sorted({row["pair"] for row in rows})) > 1:
        raise DataError(
            f"{folder} holds trajectories of {' and of '.join(pairs)}; run s2t collect into another folder."
        )


def _trajectory(row: dict[str, Any], num_candidates: int) -> Trajectory:
    def groups(name: str, kind: type) -> np.ndarray:
        return np.asarray(row[name], dtype=kind).reshape(-1, row["num_candidates"])[:, :num_candidates]

    return Trajectory(
        row["problem_id"],
        row["template"],
        np.asarray(row["prompt_ids"], dtype=np.int64),
        np.asarray(row["token_ids"], dtype=np.int64),
        np.asarray(row["divergence"], dtype=np.float32),
        np.asarray(row["group_steps"], dtype=np.int64),
        groups("candidate_ids", np.int64),
        groups("slm_logprobs", np.float32),
        groups("llm_probs", np.float32),
    )


def plan_batches(group_counts: Sequence[int], batch_groups: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle trajectories by (seed, epoch) and cut them into batches of at least `batch_groups` groups each."""
    order = np.random.default_rng([seed, epoch]).permutation(len(group_counts))
    batches: list[list[int]] = []
    current: list[int] = []
    held = 0
    for index in order.tolist():
        current.append(index)
        held += group_counts[index]
        if held >= batch_groups:
            batches.append(current)
            current, held = [], 0
    if held:
        batches.append(current)
    return batches


class HasIds(Protocol):
    """A sequence of tokens that others are predicted from."""

    @property
    def ids(self) -> np.ndarray: ...  # [T]


def pad_ids(trajectories: Sequence[HasIds]) -> Tensor:
    """Ids of all trajectories, right-padded with zeros, [b, T]."""
    ids = [t.ids for t in trajectories]
    padded = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
    for row, known in zip(padded, ids, strict=True):
        row[: len(known)] = known
    return torch.from_numpy(padded)


def make_batch(
    trajectories: Sequence[Trajectory], threshold: float, warmup_steps: int, device: torch.device, has_ids: bool = True
) -> Batch:
    """Pad and stack trajectories; groups are not padded. Where there is none, one is made up: every batch has its forward."""
    if not any(len(t.group_steps) for t in trajectories):
        trajectories = [_with_a_group(trajectories[0]), *trajectories[1:]]
    rows = [np.full(len(t.group_steps), row) for row, t in enumerate(trajectories)]
    prefixes = [len(t.prompt_ids) + t.group_steps for t in trajectories]
    last = [t.ids[prefix - 1] for t, prefix in zip(trajectories, prefixes, strict=True)]
    steps, labels = zip(*(_steps(row, t, threshold, warmup_steps) for row, t in enumerate(trajectories)), strict=True)
    step_ids = [t.ids[places[1]] for t, places in zip(trajectories, steps, strict=True)]

    def tensor(parts: Sequence[np.ndarray], axis: int = 0) -> Tensor:
        return torch.from_numpy(np.concatenate(parts, axis=axis)).to(device)

    return Batch(
        pad_ids(trajectories).to(device) if has_ids else torch.empty(0, dtype=torch.long, device=device),
        tensor([t.candidate_ids for t in trajectories]),
        tensor(rows),
        tensor(prefixes),
        tensor(last),
        tensor([t.slm_logprobs for t in trajectories]),
        tensor([t.llm_probs for t in trajectories]),
        tensor(steps, axis=1),
        tensor(step_ids),
        tensor(labels),
    )


def _with_a_group(t: Trajectory) -> Trajectory:
    """The trajectory with one group whose loss counts for nothing."""
    even = np.full((1, t.candidate_ids.shape[1]), 1 / t.candidate_ids.shape[1], dtype=np.float32)
    ids = np.zeros(even.shape, dtype=np.int64)
    return replace(t, group_steps=np.zeros(1, np.int64), candidate_ids=ids, slm_logprobs=np.log(even), llm_probs=even)


def _steps(row: int, t: Trajectory, threshold: float, warmup_steps: int) -> tuple[np.ndarray, np.ndarray]:
    live = np.arange(warmup_steps, len(t.token_ids))
    columns = len(t.prompt_ids) - 1 + live
    return np.stack([np.full_like(columns, row), columns]), t.divergence[live] > threshold
