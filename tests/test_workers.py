"""Work shared by processes is the work of one process: same results, one clear error, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from s2t.errors import DataError
from s2t.workers import Workers, turn, waiting


class Bench:
    """A state that counts how often it was opened, in a folder that all processes see."""

    def __init__(self, folder: Path) -> None:
        (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def work(self, job: int) -> tuple[int, int]:
        if job < 0:
            raise DataError(f"job {job} is bad.")
        time.sleep(0.02)
        return job * job, os.getpid()


@pytest.mark.parametrize("count", [1, 2])
def test_every_job_comes_back_once_with_its_result(count, tmp_path):
    with Workers(partial(Bench, tmp_path), count) as workers:
        for round_of_jobs in (range(12), range(3, 9)):
            found = list(workers.map(Bench.work, list(round_of_jobs)))
            assert sorted((job, square) for job, (square, _) in found) == [(j, j * j) for j in round_of_jobs]
    places = {pid for _, (_, pid) in found}
    assert len(list(tmp_path.iterdir())) <= count
    assert (places == {os.getpid()}) == (count == 1)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_opened_before_the_first_job(count, tmp_path):
    with Workers(partial(Bench, tmp_path), count) as workers:
        assert list(workers.map(Bench.work, [])) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bad_open", [True, False])
def test_an_error_of_a_job_is_raised_as_it_was(count, bad_open, tmp_path):
    start: Callable[[], Bench] = partial(Bench, tmp_path / "missing" if bad_open else tmp_path)
    with (
        pytest.raises(FileNotFoundError if bad_open else DataError, match="missing" if bad_open else "job -1 is bad"),
        Workers(start, count) as workers,
    ):
        list(workers.map(Bench.work, [1, -1]))


PARENT = """
import sys
from functools import partial
from pathlib import Path
import test_workers
if __name__ == "__main__":
    with test_workers.Workers(partial(test_workers.Bench, Path(sys.argv[1])), 2) as workers:
        for _ in workers.map(test_workers.Bench.work, list(range(100_000))):
            print("begun", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_workers_of_a_killed_parent_end(tmp_path):
    script, opened = tmp_path / "parent.py", tmp_path / "opened"
    script.write_text(PARENT)
    opened.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(opened)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"begun\n"
    workers = {int(path.name.split("-")[0]) for path in opened.iterdir()}
    assert workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(is_running(pid) for pid in workers):
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)
    parent.stdout.close()


def is_running(pid: int) -> bool:
    """False too for one that has ended and waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_share_the_threads(tmp_path):
    with Workers(partial(Bench, tmp_path), 2) as workers:
        found = list(workers.map(threads, [0, 1]))
    assert {count for _, count in found} == {max(1, torch.get_num_threads() // 2)}


def threads(bench: Bench, job: int) -> int:
    return torch.get_num_threads()


class Turns:
    """Notes who computes and who waits."""

    def __init__(self) -> None:
        self.computing = self.most_computing = self.most_waiting = self.now_waiting = self.opened = 0

    def work(self, job: int) -> int:
        if job < 0:
            raise DataError(f"job {job} is bad.")
        for _ in range(3):
            self.computing += 1
            self.most_computing = max(self.most_computing, self.computing)
            time.sleep(0.002)
            self.computing -= 1
            self.now_waiting += 1
            with waiting():
                self.most_waiting = max(self.most_waiting, self.now_waiting)
                time.sleep(0.02)
            self.now_waiting -= 1
        return job * job


def test_threads_take_turns_and_wait_together():
    state = Turns()
    with Workers(lambda: state, threads=4) as workers:
        found = dict(workers.map(Turns.work, list(range(12))))
    assert found == {job: job * job for job in range(12)}
    assert state.most_computing == 1
    assert state.most_waiting > 1


def test_an_error_in_a_thread_is_raised_ends_the_others_and_gives_the_turn_back():
    def work(state: Turns, job: int) -> int:
        for _ in range(1000 if job > 0 else 1):  # 20 s, unless it is stopped
            state.work(job)
        return job

    start = time.monotonic()
    with pytest.raises(DataError, match="job -1 is bad"), Workers(Turns, threads=3) as workers:
        list(workers.map(work, [1, 2, -1, 3]))
    assert time.monotonic() - start < 10
    with turn():
        pass


def test_waiting_without_a_turn_is_only_waiting():
    with waiting():
        pass
    with turn(), waiting(), turn():
        pass
