"""Killed with SIGKILL at moments of a seed's choice and started again, a run ends as if nothing had happened.

Most kills hit a process forked from one that has the libraries loaded, since importing them takes longer than
the runs; the child runs the same command line. One run is a `python -m s2t` of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from s2t.collect import read_groups
from s2t.config import CollectConfig, DistillConfig, EvalConfig, TrainConfig
from s2t.errors import DataError
from s2t.files import load_run, read_json, read_jsonl, read_tables

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

NURSERY = """
import os, sys
import peft, pyarrow.parquet, torch, transformers
import s2t.cli.main, s2t.collect, s2t.evaluate, s2t.train.distill, s2t.train.trainer
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # stdout is for process ids and exit codes
        code = s2t.cli.main.main(line.rstrip("\\n").split("\\t"))
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
}
COMMON = {"slm": "tiny:slm", "limit": 12, "max_new_tokens": 24, "batch_size": 8}
KILLS = 3


class Nursery:
    """Starts command lines in forked children, one at a time."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], text=True, env=ENVIRONMENT, **pipes)

    def start(self, words: list[str]) -> int:
        """Start a command and return its process id."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\t".join(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The exit code of the command that was started last; -9 when it was killed."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    assert nursery.process.stdin is not None and nursery.process.stdout is not None
    nursery.process.stdin.close()
    nursery.process.wait(timeout=30)
    nursery.process.stdout.close()


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [
        {"question": f"Tom has {n} apples and buys {n % 7} more. How many?", "answer": str(n + n % 7)}
        for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command_line(command: str, config: Any) -> list[str]:
    words = [command]
    for item in fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value is not None and value != default:
            words += [f"--{item.name.replace('_', '-')}", str(value)]
    return words


def progress_of(folder: Path) -> list[tuple[str, int]]:
    """What is on disk: shards and checkpoints with the time of their last writing."""
    found = []
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if not path.name.startswith(".") and path.name != "manifest.json":
                found.append((path.name, path.stat().st_mtime_ns))
    return sorted(found)


def is_final(folder: Path, command: str) -> bool:
    try:
        load_run(folder, command)
    except DataError:
        return False
    return True


def run_with_kills(start: Any, wait: Any, folder: Path, command: str, kills: int, rng: random.Random) -> int:
    """Kill a command soon after it wrote something new, `kills` times, then let it finish; returns how often it hit."""
    hits = 0
    for _ in range(kills):
        before = progress_of(folder)
        process = start()
        while progress_of(folder) == before and not is_final(folder, command):
            assert_is_alive(process)
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.08))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        code = wait()
        assert code in (0, -signal.SIGKILL)
        hits += code != 0
        assert code == 0 or not is_final(folder, command) or has_everything(folder, command)
    start()
    assert wait() == 0
    assert is_final(folder, command)
    return hits


def assert_is_alive(process: int) -> None:
    state = Path(f"/proc/{process}/stat")
    if state.exists():
        assert state.read_text().rsplit(")", 1)[1].split()[0] != "Z", "the command ended before it wrote anything"


def has_everything(folder: Path, command: str) -> bool:
    names = {
        "collect": "collect.json",
        "train": "adapter/s2t_config.json",
        "distill": "adapter/adapter_config.json",
        "eval": "summary.json",
    }
    return (folder / names[command]).is_file()


def interrupted_and_not(nursery: Nursery, tmp_path: Path, command: str, make: Any, seed: int) -> tuple[Path, Path]:
    """Run a command twice, once undisturbed and once with kills; the two folders."""
    rng = random.Random(seed)
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    nursery.start(command_line(command, make(str(calm))))
    assert nursery.wait() == 0
    words = command_line(command, make(str(killed)))
    assert run_with_kills(lambda: nursery.start(words), nursery.wait, killed, command, KILLS, rng) >= 1
    left = [path.name for path in killed.rglob("*") if "checkpoint" in path.name]
    assert not left
    return calm, killed


@pytest.fixture(scope="module")
def collected(nursery, problems, tmp_path_factory):
    """Two folders of groups: one collected undisturbed, one with kills."""

    def make(out: str) -> CollectConfig:
        return CollectConfig(**COMMON, task=problems, out=out, threshold=0.05, shard_size=2)

    return interrupted_and_not(nursery, tmp_path_factory.mktemp("collect"), "collect", make, seed=1)


@pytest.fixture(scope="module")
def trained(nursery, collected, tmp_path_factory):
    def make(out: str) -> TrainConfig:
        return TrainConfig(
            groups=str(collected[0]),
            out=out,
            epochs=4.0,
            lora_rank=2,
            learning_rate=1e-3,
            batch_groups=8,
            checkpoint_steps=2,
        )

    return interrupted_and_not(nursery, tmp_path_factory.mktemp("train"), "train", make, seed=2)


def test_resumed_collection_equals_uninterrupted(collected):
    calm, killed = collected
    assert list(read_groups(killed)) == list(read_groups(calm))
    assert read_json(killed / "collect.json") == read_json(calm / "collect.json")
    assert len(list(read_groups(calm))) > 0
    names = [sorted(path.name for path in folder.glob("*.parquet")) for folder in collected]
    assert names[0] == names[1] == [f"groups-{i:05d}.parquet" for i in range(6)]


def test_resumed_training_ends_with_the_same_weights(trained):
    calm, killed = trained
    for name in ("adapter_model.safetensors", "s2t_selector.safetensors"):
        left, right = (load_file(folder / "adapter" / name) for folder in (calm, killed))
        assert left.keys() == right.keys()
        assert all(left[key].equal(right[key]) for key in left)
    assert read_jsonl(killed / "train_log.jsonl") == read_jsonl(calm / "train_log.jsonl")
    assert read_json(killed / "train.json") == read_json(calm / "train.json")
    assert read_json(calm / "train.json")["num_steps"] >= 8, "too few steps to interrupt"


def test_resumed_distillation_ends_with_the_same_answers_and_weights(nursery, problems, tmp_path):
    def make(out: str) -> DistillConfig:
        return DistillConfig(
            **COMMON,
            task=problems,
            out=out,
            method="on-policy-kd",
            policy="sample",
            batch_answers=3,
            epochs=4.0,
            learning_rate=1e-3,
            lora_rank=2,
            shard_size=4,
            checkpoint_steps=2,
        )

    calm, killed = interrupted_and_not(nursery, tmp_path, "distill", make, seed=4)
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (calm, killed))
    assert left.keys() == right.keys()
    assert all(left[key].equal(right[key]) for key in left)
    tables = [[read_tables([folder / f"answers-{i:05d}.parquet"]) for i in range(3)] for folder in (calm, killed)]
    assert tables[0] == tables[1]
    assert read_jsonl(killed / "train_log.jsonl") == read_jsonl(calm / "train_log.jsonl")
    assert read_json(killed / "distill.json") == read_json(calm / "distill.json")
    assert read_json(calm / "distill.json")["num_steps"] == 16


def test_resumed_evaluation_equals_uninterrupted(nursery, problems, trained, tmp_path):
    def make(out: str) -> EvalConfig:
        return EvalConfig(
            **COMMON,
            llm="tiny:llm",
            task=problems,
            out=out,
            strategies="greedy,self-consistency,s2t@criticality,s2t-local",
            adapter=str(trained[0] / "adapter"),
            threshold=0.1,
            num_samples=2,
            num_traces=1,
            shard_size=4,
        )

    calm, killed = interrupted_and_not(nursery, tmp_path, "eval", make, seed=3)
    for name in ("results.jsonl", "traces.jsonl"):
        assert read_jsonl(killed / name) == read_jsonl(calm / name)
    summaries = [read_json(folder / "summary.json") for folder in (calm, killed)]
    for summary in summaries:
        for scores in summary["strategies"].values():
            assert scores.pop("seconds") > 0
    assert summaries[0] == summaries[1]


def test_a_process_of_its_own_that_is_killed_resumes_too(nursery, problems, collected, tmp_path):
    config = CollectConfig(**COMMON, task=problems, out=str(tmp_path / "own"), threshold=0.05, shard_size=2)
    words = command_line("collect", config)
    with subprocess.Popen(
        [sys.executable, "-m", "s2t", *words],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not progress_of(tmp_path / "own"):
            assert process.poll() is None, "the command ended before it wrote anything"
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not is_final(tmp_path / "own", "collect")
    nursery.start(words)
    assert nursery.wait() == 0
    assert list(read_groups(tmp_path / "own")) == list(read_groups(collected[0]))
