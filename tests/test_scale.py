"""Ray actors do what one process does: same results, lost ones replaced, one clear error, nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2t.config import PLACES, CollectConfig, EvalConfig, MeasureConfig
from s2t.errors import ConfigError, DataError, WorkerError
from s2t.files import RunFolder, load_run, read_jsonl, read_tables
from s2t.scale import RayWorkers, Shard, open_workers, to_files, write_missing
from s2t.workers import Workers

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:.*RAY_:FutureWarning")


class Bench:
    """A state that counts how often it was opened, in a folder that all actors see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"opened-{os.getpid()}-{time.monotonic_ns()}").touch()

    def work(self, job: int) -> tuple[int, int, str]:
        if job < 0:
            raise DataError(f"job {job} is bad.")
        time.sleep(0.05)
        return job * job, os.getpid(), os.getcwd()

    def die_once(self, job: int) -> int:
        """Kills its process at job 3, the first time."""
        mark = self.folder / "died"
        if job == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return job * job

    def die_always(self, job: int) -> int:
        if job == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return job


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this test run alone, which every RayWorkers finds running."""
    from ray import cloudpickle

    from s2t.scale import _join

    _join(ray, "local", 2)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def test_two_actors_work_every_job_once_and_errors_come_as_they_were(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RayWorkers(partial(Bench, tmp_path), "local", 2) as workers:
        assert list(workers.map(Bench.work, [])) == []
        assert not list(tmp_path.iterdir()), "nothing is opened before the first job"
        for jobs in (range(24), range(3, 9)):
            found = dict(workers.map(Bench.work, list(jobs)))
            assert {job: square for job, (square, _, _) in found.items()} == {job: job * job for job in jobs}
            assert {place for _, _, place in found.values()} == {str(tmp_path)}
        assert len(list(tmp_path.glob("opened-*"))) <= 2
        with pytest.raises(DataError, match=r"^job -1 is bad\.$"):
            list(workers.map(Bench.work, [1, -1, 2]))
        assert dict(workers.map(Bench.die_once, list(range(8)))) == {job: job * job for job in range(8)}
        assert (tmp_path / "died").exists()
        assert 2 <= len(list(tmp_path.glob("opened-*"))) <= 4
    assert ray.is_initialized(), "a cluster that was there before stays"


@pytest.mark.slow
def test_a_job_that_kills_every_worker_ends_the_run_with_one_line(cluster, tmp_path, capfd):
    with RayWorkers(partial(Bench, tmp_path), "local", 2) as workers:
        with pytest.raises(WorkerError, match="a worker died 3 times over the same job"):
            list(workers.map(Bench.die_always, [1, 2, 3]))
        assert dict(workers.map(Bench.die_always, [1, 2])) == {1: 1, 2: 2}
    assert capfd.readouterr().err.count("a Ray worker was lost") == 2


def test_only_missing_files_are_worked_and_each_is_written_as_it_comes(tmp_path):
    shards = to_files([[1, 2], [3], [4, 5]], lambda i: tmp_path / f"part-{i}")
    (tmp_path / "part-1").write_text("kept")
    seen: list[int] = []

    def work(state: str, shard: Shard[int]) -> str:
        seen.append(shard.index)
        assert all((tmp_path / f"part-{i}").exists() for i in seen[:-1])
        return f"{state}{sum(shard.items)}"

    with Workers(lambda: "sum ") as workers:
        for _ in range(2):
            write_missing(workers, work, shards, Path.write_text, "parts")
    assert seen == [0, 2]
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["sum 3", "kept", "sum 9"]


def test_settings_choose_who_works(tmp_path):
    places = SimpleNamespace(workers=3, ray=None, ray_actors=None, ray_gpus=1.0)
    assert isinstance(open_workers(object, places), Workers)
    places.ray = "local"
    assert isinstance(open_workers(object, places), RayWorkers)
    with pytest.raises(ConfigError, match="pass --workers or --ray, not both"):
        CollectConfig(ray="local", workers=2)
    with pytest.raises(ConfigError, match="ray_actors must be at least 1"):
        CollectConfig(ray="local", ray_actors=0)


def test_where_a_run_is_worked_may_change_when_it_resumes(tmp_path):
    RunFolder.open(tmp_path, "collect", CollectConfig(), PLACES)
    (tmp_path / "groups-00000.parquet").touch()
    RunFolder.open(tmp_path, "collect", CollectConfig(ray="auto", ray_actors=8, ray_gpus=0.5), PLACES)
    with pytest.raises(ConfigError, match="was made with limit=500, now limit=9"):
        RunFolder.open(tmp_path, "collect", CollectConfig(limit=9), PLACES)


def test_ray_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(Exception, match=r"ray is not installed; run: pip install 's2t\[ray\]'"),
        RayWorkers(int) as workers,
    ):
        list(workers.map(pow, [1]))


SHORT = {"slm": "tiny:slm", "llm": "tiny:llm", "limit": 12, "max_new_tokens": 24, "batch_size": 8}
RAY = {"ray": "local", "ray_actors": 2}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"question": f"Tom has {n} apples and buys {n % 7} more. How many?", "answer": str(n)} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_two_actors_write_what_one_process_writes(cluster, problems, tmp_path):
    from s2t.collect import collect, read_groups
    from s2t.evaluate import evaluate
    from s2t.measure import measure

    measured = MeasureConfig(**SHORT, task=problems, out="measure", shard_size=3)
    collected = CollectConfig(**SHORT, task=problems, out="collect", threshold=0.05, shard_size=3)
    evaluated = EvalConfig(**SHORT, task=problems, out="eval", strategies="greedy,llm", shard_size=3)
    for function, config in ((measure, measured), (collect, collected), (evaluate, evaluated)):
        one, two = (tmp_path / f"{config.out}-{n}" for n in (1, 2))
        results = [function(config.__class__(**vars(config) | {"out": str(one)}))]
        results.append(function(config.__class__(**vars(config) | RAY | {"out": str(two)})))
        names = [sorted(path.name for path in folder.iterdir()) for folder in (one, two)]
        assert names[0] == names[1]
        tables = [
            read_tables(sorted(folder.glob("*.parquet"))) for folder in (one, two) if list(folder.glob("*.parquet"))
        ]
        assert not tables or tables[0].equals(tables[1])
        if function is evaluate:
            assert read_jsonl(one / "results.jsonl") == read_jsonl(two / "results.jsonl")
        else:
            assert results[0] == results[1]
    assert list(read_groups(tmp_path / "collect-1")) == list(read_groups(tmp_path / "collect-2"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_a_killed_driver_leaves_nobody_behind_and_resumes(problems, tmp_path):
    from s2t.collect import collect, read_groups

    settings: dict[str, Any] = SHORT | {"task": problems, "threshold": 0.05, "shard_size": 2}
    collect(CollectConfig(**settings, out=str(tmp_path / "calm")))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (settings | RAY).items()]
    command = [sys.executable, "-m", "s2t", "collect", *words, f"--out={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr) as driver,
    ):
        deadline = time.monotonic() + 600
        while not list((tmp_path / "run").glob("groups-*.parquet")):
            assert time.monotonic() < deadline, "the run wrote nothing in ten minutes"
            assert driver.poll() is None, f"the run ended before it wrote anything: {(tmp_path / 'stderr').read_text()}"
            time.sleep(0.01)
        helpers = descendants(driver.pid)
        actors = {pid for pid in helpers if "ray::_Actor" in command_of(pid)}
        driver.kill()
    assert actors
    wait_for_the_end_of(actors, 30)
    wait_for_the_end_of(helpers, 120)  # two agents of Ray spend 60 s on telling a cluster that is gone
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("groups-*.parquet")}
    assert 1 <= len(written) < 6
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=600)
    load_run(tmp_path / "run", "collect")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items()), "finished shards stay"
    assert list(read_groups(tmp_path / "run")) == list(read_groups(tmp_path / "calm"))


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for_the_end_of(pids: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := [command_of(pid) for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """False too for one that has ended and waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
