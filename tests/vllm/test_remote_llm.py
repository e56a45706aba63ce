"""Models on real vLLM servers: the same tokens as in this process, and nothing lost when servers and driver are killed.

Run by `make test-vllm`.
"""

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

from s2t.files import read_json, read_jsonl, read_tables
from s2t.model.tiny import embedded_path

ROOT = Path(__file__).parents[2]
SAME_SUPPORT = ["--support", "llm-top", "--support-size", "20"]

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(serve_vllm):
    """A server of the embedded LLM."""
    return serve_vllm(embedded_path("tiny:llm"), "--served-model-name", "llm")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def evaluate(out: Path, *options: str) -> list[dict]:
    command = [sys.executable, "-m", "s2t", "eval", "--llm", "tiny:llm", "--threshold", "0.3", "--out", str(out)]
    subprocess.run([*command, *options], env=environment(), check=True, capture_output=True)
    return read_jsonl(out / "results.jsonl")


def same_text(left: list[dict], right: list[dict]) -> int:
    pairs = zip(left, right, strict=True)
    return sum(
        (a["problem_id"], a["strategy"], a["text"]) == (b["problem_id"], b["strategy"], b["text"]) for a, b in pairs
    )


def test_a_hundred_problems_come_out_as_in_process(server, tmp_path):
    options = ("--strategies", "s2t,takeover,llm", "--limit", "100", "--num-traces", "0")
    here = evaluate(tmp_path / "here", *options, *SAME_SUPPORT)
    there = evaluate(tmp_path / "there", *options, "--llm-url", server.url)
    print(json.dumps(read_json(tmp_path / "there" / "summary.json")["llm_server"]))
    assert same_text(here, there) == len(here) == 300
    assert [r["num_triggered"] for r in here] == [r["num_triggered"] for r in there]


EVAL = ["eval", "--num-traces", "0", "--strategies"]
STORMS = {
    "eval": ([*EVAL, "llm"], "results-llm-*.json", "summary.json"),
    "collect": (["collect", "--policy", "greedy", "--threshold", "0.3"], "groups-*.parquet", "collect.json"),
    "s2t-local": ([*EVAL, "greedy,s2t-local", "--max-new-tokens", "96"], "results-s2t-local-*.json", "summary.json"),
}
SHAPE = ["--limit", "1000", "--shard-size", "50", "--batch-size", "50"]
PLUGIN = ("--logits-processors", "s2t.integrations.vllm:SelectToThink")


@pytest.mark.parametrize("command", STORMS)
def test_a_thousand_problems_survive_a_killed_server_and_a_driver_killed_three_times(
    command, request, serve_vllm, tmp_path
):
    words, pattern, summary = STORMS[command]
    if command == "s2t-local":
        folder = request.getfixturevalue("merged")("always")
        stays, doomed = (serve_vllm(folder, *PLUGIN) for _ in range(2))
        where = ["--slm", folder, "--slm-url", f"{stays.url},{doomed.url}"]
    else:
        stays = request.getfixturevalue("server")
        doomed = serve_vllm(embedded_path("tiny:llm"), "--served-model-name", "llm")
        where = ["--llm", "tiny:llm", "--llm-url", f"{stays.url},{doomed.url}"]
    run = [sys.executable, "-m", "s2t", *words, *SHAPE, *where]
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    start = time.monotonic()
    subprocess.run([*run, "--out", str(calm)], env=environment(), check=True, capture_output=True)
    print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)

    kills, start = [], time.monotonic()
    for shards_before_kill in (3, 8, 14):
        driver = subprocess.Popen(
            [*run, "--out", str(stormy)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if shards_before_kill == 14:
            wait_for_shards(stormy, pattern, kills[-1] + 1, driver)
            doomed.kill()  # while the driver has requests there
        wait_for_shards(stormy, pattern, shards_before_kill, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        kills.append(len(list(stormy.glob(pattern))))
    subprocess.run([*run, "--out", str(stormy)], env=environment(), check=True, capture_output=True)
    report = read_json(stormy / summary)["slm_server" if command == "s2t-local" else "llm_server"]
    print(f"killed at {kills} of 20 shards, then finished: {time.monotonic() - start:.0f} s; {json.dumps(report)}")
    assert report["drained"].get(doomed.url)
    assert sum(report["retries"].values()) > 0
    if command == "collect":
        assert_same_groups(calm, stormy)
        return
    results = read_jsonl(stormy / "results.jsonl")
    asked = {(result["problem_id"], result["strategy"]) for result in results}
    assert len(asked) == len(results) == (2000 if command == "s2t-local" else 1000)
    undisturbed = read_jsonl(calm / "results.jsonl")
    if command == "s2t-local":  # how often a row waited or was asked for again is in its cost
        results, undisturbed = without_cost(results), without_cost(undisturbed)
    assert results == undisturbed


def without_cost(results: list[dict]) -> list[dict]:
    return [{name: value for name, value in result.items() if name != "cost"} for result in results]


def wait_for_shards(out: Path, pattern: str, count: int, driver: subprocess.Popen) -> None:
    while len(list(out.glob(pattern))) < count:
        assert driver.poll() is None, "the driver ended by itself"
        time.sleep(0.1)


def assert_same_groups(calm: Path, stormy: Path) -> None:
    left, right = (read_tables(sorted(out.glob("groups-*.parquet"))) for out in (calm, stormy))
    assert len(set(right["problem_id"].to_pylist())) == right.num_rows == 1000
    for name in ("problem_id", "token_ids", "group_steps", "candidate_ids"):
        assert left[name].equals(right[name]), name
    for name in ("divergence", "llm_probs"):  # the last digits depend on what else the server worked on
        pair = [np.concatenate(table[name].to_numpy()) for table in (left, right)]
        np.testing.assert_allclose(pair[1], pair[0], atol=1e-4)
