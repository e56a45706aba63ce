"""Groups to batches: trajectories stay whole, plans depend on (seed, epoch) alone, bad runs are one clear line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from s2t.collect import SCHEMA, _Collector
from s2t.config import CollectConfig
from s2t.errors import ConfigError, DataError
from s2t.files import RunFolder, write_json, write_table
from s2t.train.dataset import make_batch, plan_batches, read_group_data
from s2t.train.validation import split_by_problem

COUNTS = [3, 0, 5, 1, 2, 0, 7, 4, 1, 1]
HELD = ["b", "a"]


def write_run(folder, trajectories, pair="a/b", held=HELD, is_finished=True, threshold=1.0, **settings):
    """A collected run on disk, as `s2t collect` leaves it."""
    config = CollectConfig(out=str(folder), threshold=threshold, **settings)
    run = RunFolder.open(folder, "collect", config)
    rows = [
        {
            "task": config.task,
            "split": config.split,
            "policy": "greedy",
            "pair": pair,
            "seed": 0,
            "problem_id": t.problem_id,
            "template": t.template,
            "num_candidates": t.candidate_ids.shape[1],
            **{name: getattr(t, name).ravel() for name in ("prompt_ids", "token_ids", "divergence", "group_steps")},
            **{name: getattr(t, name).ravel() for name in ("candidate_ids", "slm_logprobs", "llm_probs")},
        }
        for t in trajectories
    ]
    for index in range(0, len(rows), 2):
        write_table(run.shard("groups", index // 2, "parquet"), pa.Table.from_pylist(rows[index : index + 2], SCHEMA))
    num_groups = sum(len(t.group_steps) for t in trajectories)
    write_json(run.file("collect.json"), {"num_groups": num_groups, "threshold": 1.0, "heldout_templates": held})
    if is_finished:
        run.finish()
    return str(folder)


# Plans


def test_batches_keep_whole_trajectories_each_at_most_once():
    plan = plan_batches(COUNTS, 4, seed=0, epoch=0)
    used = [index for batch in plan for index in batch]
    assert len(used) == len(set(used))
    assert {index for index, count in enumerate(COUNTS) if count} <= set(used)
    for batch in plan[:-1]:
        held = [COUNTS[index] for index in batch]
        assert sum(held) >= 4 > sum(held[:-1])
    assert all(sum(COUNTS[index] for index in batch) > 0 for batch in plan)


def test_a_plan_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = plan_batches(COUNTS, 4, seed=3, epoch=2)
    torch.manual_seed(2)
    np.random.seed(9)
    assert plan_batches(COUNTS, 4, seed=3, epoch=2) == first
    assert plan_batches(COUNTS, 4, seed=3, epoch=1) != first
    assert plan_batches(COUNTS, 4, seed=4, epoch=2) != first


def test_every_epoch_has_as_many_steps_as_the_first(new_adapter, new_trainer):
    trainer = new_trainer(new_adapter("candidates"), batch_groups=2, epochs=3.0)
    assert {len(trainer._plan(epoch)) for epoch in range(5)} == {trainer.steps_per_epoch}
    assert trainer.num_steps == 3 * trainer.steps_per_epoch


# Batches


def test_a_batch_holds_every_group_on_its_own_prefix(trajectories):
    batch = make_batch(trajectories, 1.0, 3, torch.device("cpu"))
    groups = [(row, step) for row, t in enumerate(trajectories) for step in t.group_steps.tolist()]
    assert len(groups) == len(batch.group_row) == len(batch.candidate_ids)
    for place, (row, step) in enumerate(groups):
        t = trajectories[row]
        length = int(batch.prefix_lengths[place])
        assert int(batch.group_row[place]) == row
        assert batch.ids[row, :length].tolist() == [*t.prompt_ids, *t.token_ids[:step]]


def test_a_batch_trains_criticality_on_every_step_past_the_warmup(trajectories):
    batch = make_batch(trajectories, 1.0, 3, torch.device("cpu"))
    assert batch.step_index.shape[1] == sum(len(t.token_ids) - 3 for t in trajectories)
    assert int(batch.is_critical.sum()) == sum(len(t.group_steps) for t in trajectories)
    row, column = batch.step_index
    first = trajectories[0]
    assert column[row == 0].tolist() == [len(first.prompt_ids) - 1 + t for t in range(3, len(first.token_ids))]


# Runs on disk


def test_the_policy_that_writes_warms_up_as_long_as_the_groups_do():
    collector = object.__new__(_Collector)
    collector.config = CollectConfig(policy="s2t", warmup_steps=12, threshold=0.5)
    collector.threshold, collector.pair = 0.5, SimpleNamespace(selector_config=None)
    assert collector._policy().warmup_steps == 12


def test_what_was_collected_is_what_is_trained_on(tmp_path, trajectories):
    data = read_group_data(write_run(tmp_path / "run", trajectories), 3)
    assert (data.num_groups, data.threshold, data.warmup_steps) == (
        sum(len(t.group_steps) for t in trajectories),
        1.0,
        3,
    )
    assert (data.pair, data.split, data.heldout_templates) == ("a/b", "train", ("a", "b"))
    for found, made in zip(data.trajectories, trajectories, strict=True):
        np.testing.assert_array_equal(found.ids, made.ids)
        np.testing.assert_array_equal(found.candidate_ids, made.candidate_ids[:, :3])
        np.testing.assert_array_equal(found.llm_probs, made.llm_probs[:, :3])


def test_several_runs_of_one_kind_are_read_together(tmp_path, trajectories):
    folders = [
        write_run(tmp_path / "one", trajectories[:2], held=["a", "b"]),
        write_run(tmp_path / "two", trajectories[2:], held=["b", "c"]),
    ]
    data = read_group_data(" , ".join(folders), 4)
    assert [t.problem_id for t in data.trajectories] == [t.problem_id for t in trajectories]
    assert data.heldout_templates == ("b",)  # held out by both
    assert data.heldout_by_task == {}


@pytest.mark.parametrize("changes", [{"pair": "a/c"}, {"split": "calibration"}])
def test_runs_of_different_pairs_or_splits_do_not_mix(changes, tmp_path, trajectories):
    folders = [
        write_run(tmp_path / "one", trajectories),
        write_run(tmp_path / "two", trajectories, **changes),
    ]
    with pytest.raises(DataError, match="differ in pair or split: expected a/b, train, got"):
        read_group_data(",".join(folders), 4)


def test_runs_of_several_tasks_keep_the_heldout_templates_of_each(tmp_path, trajectories):
    seen = [replace(t, template="b") for t in trajectories[2:]]
    folders = [
        write_run(tmp_path / "one", trajectories[:2], held=["a", "b"], task="gsm8k"),
        write_run(tmp_path / "two", seen, held=["c", "d"], task="more.jsonl"),
        write_run(tmp_path / "three", seen[:1], held=["d", "e"], task="more.jsonl"),
    ]
    data = read_group_data(",".join(folders), 4)
    assert data.task == "gsm8k;more.jsonl"
    assert data.heldout_by_task == {"gsm8k": ("a", "b"), "more.jsonl": ("d",)}
    assert data.heldout_templates == ("a", "d")  # the other task was trained on a template called b
    assert len(data.trajectories) == len(trajectories) + 1


def test_runs_of_different_thresholds_do_not_mix(tmp_path, trajectories):
    folders = [write_run(tmp_path / name, trajectories) for name in ("one", "two")]
    summary = Path(folders[1]) / "collect.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"threshold": 2.0}))
    with pytest.raises(DataError, match=r"expected threshold 1\.0 past 3 steps, got 2\.0 past 3"):
        read_group_data(",".join(map(str, folders)), 4)


def test_fewer_stored_candidates_than_asked_for_is_one_clear_line(tmp_path, trajectories):
    folder = write_run(tmp_path / "run", trajectories)
    with pytest.raises(ConfigError, match=r"num_candidates is 5 but .* stores 4 a group; lower --num-candidates"):
        read_group_data(folder, 5)


def test_an_unfinished_run_is_refused(tmp_path, trajectories):
    folder = write_run(tmp_path / "run", trajectories, is_finished=False)
    with pytest.raises(DataError, match="unfinished run of s2t collect; rerun"):
        read_group_data(folder, 4)


def test_a_folder_that_is_no_run_and_a_run_of_another_command_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        read_group_data(str(tmp_path / "nothing"), 4)
    RunFolder.open(tmp_path / "other", "measure", CollectConfig()).finish()
    with pytest.raises(DataError, match="written by s2t collect; got one of s2t measure"):
        read_group_data(str(tmp_path / "other"), 4)
    with pytest.raises(ConfigError, match="needs --groups"):
        read_group_data(" , ", 4)


def test_a_run_without_groups_says_what_to_do(tmp_path, trajectories):
    none = [t.__class__(*(getattr(t, name) for name in t.__slots__[:5]), *empty_groups()) for t in trajectories]
    folder = write_run(tmp_path / "run", none)
    with pytest.raises(DataError, match="holds no selection group; collect more problems or lower the threshold"):
        read_group_data(folder, 4)


def test_a_run_whose_groups_are_all_held_out_says_what_to_do(data, new_adapter, new_trainer):
    held = split_by_problem(data.trajectories, 0.5)[1]
    none = dict(zip(("group_steps", "candidate_ids", "slm_logprobs", "llm_probs"), empty_groups(), strict=True))
    assert held
    for place in set(range(len(data.trajectories))) - set(held):
        data.trajectories[place] = replace(data.trajectories[place], **none)
    with pytest.raises(DataError, match="no selection group is left to train on"):
        new_trainer(new_adapter("step"), heldout_problems=0.5)


def test_trajectories_of_two_kinds_in_one_run_are_refused(tmp_path, trajectories):
    folder = write_run(tmp_path / "run", trajectories)
    path = sorted(Path(folder).glob("groups-*.parquet"))[0]
    rows = [row | {"pair": "a/remote:b"} for row in pq.read_table(path).to_pylist()]
    write_table(path, pa.Table.from_pylist(rows, SCHEMA))
    RunFolder.open(folder, "collect", CollectConfig(out=folder, threshold=1.0)).finish()
    with pytest.raises(DataError, match="holds trajectories of a/b and of a/remote:b"):
        read_group_data(folder, 4)


def empty_groups():
    return (
        np.zeros(0, np.int64),
        np.zeros((0, 4), np.int64),
        np.zeros((0, 4), np.float32),
        np.zeros((0, 4), np.float32),
    )
