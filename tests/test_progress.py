"""Long work is never silent: a line that moves, with what is finished, tokens, rate and time left; not per shard."""

from __future__ import annotations

import multiprocessing
import re
import time

import pytest

from s2t import progress
from s2t.config import DecodeConfig
from s2t.decode.label import label
from s2t.decode.pair import Pair
from s2t.methods.strategies import build_strategy
from s2t.model import load
from s2t.progress import Bar, count, counted_as
from s2t.records import Request
from s2t.scale import open_workers, to_files, write_missing


class Clock:
    """A time that the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    return found


def test_a_line_says_what_is_finished_how_fast_and_what_is_left(clock):
    bar = Bar("collect", 10, 2)
    clock.now += 4
    count(finished=2, tokens=800)
    assert bar.text() == "4 of 10 problems, 800 tokens, 200 tokens/s, 4 s so far, about 12 s left"


def test_parts_of_problems_count_before_any_is_finished(clock):
    bar = Bar("collect", 4)
    clock.now += 10
    assert bar.text() == "0 of 4 problems, 10 s so far"
    for _ in range(100):
        count(credit=0.01, tokens=1)
    assert bar.text() == "0 of 4 problems, 100 tokens, 10 tokens/s, 10 s so far, about 30 s left"


def test_what_shards_say_and_what_is_counted_never_add_up_twice(clock):
    bar = Bar("collect", 4)
    clock.now += 1
    count(finished=2)
    bar(2)
    assert bar.text().startswith("2 of 4 problems")
    bar(2)  # of workers elsewhere
    assert bar.text().startswith("4 of 4 problems")
    count(finished=3)
    assert bar.text().startswith("4 of 4 problems") and bar.credit == 4


def test_a_problem_that_is_written_and_read_counts_once(tiny_slm, tiny_llm):
    bar, texts = Bar("measure", 2), []
    requests = [Request(i, [5 + i, 6]) for i in range(2)]
    pair = Pair(tiny_slm)
    with counted_as(1 / 2):
        done = pair.write(
            build_strategy("greedy", DecodeConfig(), {}), requests, 16, on_finish=lambda: texts.append(bar.credit)
        )
        assert bar.credit == pytest.approx(1)
        label(tiny_slm, tiny_llm, [r.prompt_ids for r in requests], [s.token_ids for s in done])
    assert bar.credit == pytest.approx(2)
    assert 0 < texts[0] <= texts[1] == pytest.approx(1)
    with counted_as(0):
        count(finished=5)
    assert bar.credit == pytest.approx(2)


def slow(state, shard):
    for _ in shard.items:
        for _ in range(5):
            time.sleep(0.02)
            count(credit=0.2, tokens=7)
        count(finished=1, credit=0)


class Places:
    workers, ray, ray_actors, ray_gpus = 1, None, None, 1.0


class TwoProcesses(Places):
    workers = 2


def nothing():
    return None


@pytest.mark.parametrize("places", [Places, TwoProcesses])
def test_a_log_moves_within_a_shard(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.05)
    shards = to_files([list(range(8)), list(range(8))], lambda i: tmp_path / f"{i}")
    with open_workers(nothing, places()) as workers:
        write_missing(workers, slow, shards, lambda path, result: path.write_text("done"), "work")
    lines = capsys.readouterr().err.splitlines()
    numbers = [int(match[1]) for line in lines if (match := re.match(r"work: (\d+) of 16 problems", line))]
    assert numbers == sorted(numbers)
    assert len(set(numbers) - {0, 8, 16}) >= 2, lines
    assert any(re.search(r"tokens, [\d,]+ tokens/s, .* so far, about .* left", line) for line in lines)
    assert lines[-1].startswith("work: 16 done")


def test_work_inside_other_work_is_shown_behind_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.02)
    with progress.progress("collect", 5), progress.progress("load x", 3, unit="tensors", brief=True) as bar:
        bar(2)
        time.sleep(0.1)
    err = capsys.readouterr().err
    assert "collect: 0 of 5 problems, 0 s so far; load x: 2 of 3 tensors" in err


def test_a_model_that_takes_long_to_load_shows_its_tensors(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    plain = load.check_runs

    def slowly(name, model):
        time.sleep(0.1)
        plain(name, model)

    monkeypatch.setattr(load, "check_runs", slowly)
    load.load_model("tiny:slm")
    assert re.search(r"load tiny:slm: (\d+) of \1 tensors", capsys.readouterr().err)


def test_what_is_quick_and_brief_leaves_no_line(capsys):
    load.load_model("tiny:slm")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_ends_with_all_that_was_done(monkeypatch):
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=160))
    with progress.progress("work", 3) as bar:
        time.sleep(0.3)
        count(finished=2, tokens=50)
        bar(3)
    assert "3 of 3 problems, 50 tokens" in screen.getvalue()


def test_a_worker_process_shows_nothing_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    with progress.progress("work", 3):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
