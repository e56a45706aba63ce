"""measure, collect and eval with an LLM on servers: the files of a run in process, resumable, whatever fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from s2t import workflows
from s2t.files import read_json, read_jsonl, read_tables

SMALL = {"limit": 5, "max_new_tokens": 32, "shard_size": 2, "batch_size": 4}
SAME = {"support": "llm-top", "support_size": 20}
FAULTS = ("429", "500", "garbage", "half", "reset", "wrong")


@pytest.fixture
def two_servers(serve, model_answers, tiny_llm):
    """Two servers of the embedded LLM that spoil a fifth of their replies."""
    return [serve(model_answers(tiny_llm), fault_rate=0.2, faults=FAULTS, seed=i) for i in range(2)]


def remote(servers) -> dict:
    return {"llm": "tiny:llm", "llm_url": [server.url for server in servers], "llm_model": "llm"}


def assert_reported(report, servers):
    assert report["is_exact"]
    assert report["calls"] > 0
    spoilt = sum(sum(server.spoilt.values()) for server in servers)
    assert sum(report["retries"].values()) <= spoilt  # but for those of finding out what the servers can do
    assert spoilt > 0
    assert report["urls"] == [server.url for server in servers]


def test_measure_finds_the_same(two_servers, tmp_path, capfd):
    here = workflows.measure(out=str(tmp_path / "here"), **SMALL, **SAME)
    there = workflows.measure(out=str(tmp_path / "there"), **SMALL, **remote(two_servers))
    assert capfd.readouterr().err.count("one request per draft (prompt_logprobs)") == 1
    assert_reported(there.pop("llm_server"), two_servers)
    left, right = (read_tables(sorted((tmp_path / name).glob("steps-*.parquet"))) for name in ("here", "there"))
    for name in ("problem_id", "step", "token_id", "rank"):
        assert left[name].equals(right[name])
    np.testing.assert_allclose(right["divergence"], left["divergence"], atol=1e-4)
    assert there["hit_rate"] == here["hit_rate"]


@pytest.mark.parametrize("policy", [pytest.param("greedy", marks=pytest.mark.slow), "s2t"])
def test_collect_finds_the_same_groups(two_servers, tmp_path, policy):
    settings = {"policy": policy, "threshold": 0.2, **SMALL}
    workflows.collect(out=str(tmp_path / "here"), **settings, **SAME)
    counts = workflows.collect(out=str(tmp_path / "there"), **settings, **remote(two_servers))
    assert_reported(counts["llm_server"], two_servers)
    left, right = (read_tables(sorted((tmp_path / name).glob("groups-*.parquet"))) for name in ("here", "there"))
    assert counts["num_groups"] > 0
    for name in ("problem_id", "prompt_ids", "token_ids", "group_steps", "candidate_ids", "slm_logprobs"):
        assert left[name].equals(right[name]), name
    flat = [np.concatenate(table["llm_probs"].to_numpy()) for table in (left, right)]
    np.testing.assert_allclose(flat[1], flat[0], atol=1e-5)


def test_eval_writes_the_same_answers(two_servers, tmp_path):
    settings = {"strategies": "s2t,llm", "threshold": 0.2, **SMALL}
    workflows.evaluate(out=str(tmp_path / "here"), llm="tiny:llm", **settings, **SAME)
    there = workflows.evaluate(out=str(tmp_path / "there"), **settings, **remote(two_servers), prompt_price=2.0)
    assert there["llm_server"]["cost"] > 0
    assert there["pair"]["llm_params"] == read_json(tmp_path / "here" / "pair.json")["llm_params"]
    left, right = (read_jsonl(tmp_path / name / "results.jsonl") for name in ("here", "there"))
    assert [r["text"] for r in left] == [r["text"] for r in right]
    traces = [json.loads(line) for line in (tmp_path / "there" / "traces.jsonl").read_text().splitlines()]
    assert len(traces) == 2 * SMALL["limit"]
    text = (tmp_path / "there" / "traces.jsonl").read_text()
    assert "NaN" not in text


def test_a_run_may_go_on_with_other_servers_and_another_pace(serve, model_answers, tiny_llm, tmp_path):
    first, second = serve(model_answers(tiny_llm)), serve(model_answers(tiny_llm))
    settings = {"out": str(tmp_path), **SMALL, "llm": "tiny:llm"}
    done = workflows.measure(**settings, llm_url=[first.url])
    for path in sorted(tmp_path.glob("steps-*.parquet"))[1:]:
        path.unlink()
    (tmp_path / "manifest.json").write_text(
        (tmp_path / "manifest.json").read_text().replace('"status": "complete"', '"status": "running"')
    )
    again = workflows.measure(**settings, llm_url=[second.url], max_in_flight=3, shards_in_flight=2)
    assert second.answered > 0
    assert second.most_in_flight <= 3
    assert again["llm_server"]["calls"] > done["llm_server"]["calls"]  # of both runs together
    assert {k: v for k, v in again.items() if k != "llm_server"} == {k: v for k, v in done.items() if k != "llm_server"}


@pytest.mark.slow
def test_a_driver_killed_three_times_loses_and_doubles_nothing(two_servers, tmp_path):
    settings = {**SMALL, "limit": 40, "strategies": "s2t", "threshold": 0.2, "llm": "tiny:llm"}
    workflows.evaluate(out=str(tmp_path / "calm"), **settings, **SAME)
    out = tmp_path / "stormy"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    command = [sys.executable, "-m", "s2t", "eval", *flags, "--out", str(out)]
    command += [f"--llm-url={server.url}" for server in two_servers]
    environment = os.environ | {"PYTHONPATH": str(Path(workflows.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for shards in (2, 7, 12):
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("results-s2t-*.json"))) < shards:
            assert driver.poll() is None
            time.sleep(0.05)
        if shards == 7:
            two_servers[1].is_dead = True
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    calm, stormy = (read_jsonl(tmp_path / name / "results.jsonl") for name in ("calm", "stormy"))
    assert [r["problem_id"] for r in stormy] == [r["problem_id"] for r in calm]
    assert [(r["text"], r["num_triggered"]) for r in stormy] == [(r["text"], r["num_triggered"]) for r in calm]
    report = read_json(out / "summary.json")["llm_server"]
    assert report["drained"].get(two_servers[1].url)
