"""Two hundred clients at once for a minute (S2T_LOAD_S sets how long): nobody is stuck or lied to, memory stays where it is."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter

import httpx
import psutil
import pytest

CLIENTS, SECONDS = 200, float(os.environ.get("S2T_LOAD_S", "60"))
WARM_UP_S = 15.0
STRATEGIES = ["greedy", "s2t-local", "sample"]


def question(rng):
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    return f"Ava has {a} apples and buys {b} more. How many apples has she?"


class Client:
    """Asks again and again: streamed or not, short or long; one in ten hangs up in the middle."""

    def __init__(self, place, http, url, until):
        self.rng = random.Random(place)
        self.http, self.url, self.until = http, url, until
        self.leaves = place % 10 == 0
        self.counts, self.seconds = Counter(), []

    async def run(self):
        while time.monotonic() < self.until:
            start = time.monotonic()
            outcome = await self.ask()
            self.counts[outcome] += 1
            if outcome == "429":
                await asyncio.sleep(self.rng.uniform(0.5, 1.5))
            elif outcome == "ok":
                self.seconds.append(time.monotonic() - start)

    def body(self):
        strategy = self.rng.choice(STRATEGIES)
        body = {
            "model": "tiny:slm",
            "messages": [{"role": "user", "content": question(self.rng)}],
            "max_tokens": self.rng.choice([8, 32, 128]),
            "stream": self.leaves or self.rng.random() < 0.5,
            "s2t": {"strategy": strategy, "details": self.rng.random() < 0.1},
            "stop": ["####"] if self.rng.random() < 0.2 else None,
        }
        return body | ({"seed": self.rng.randint(0, 9), "temperature": 1.0} if strategy == "sample" else {})

    async def ask(self):
        async with self.http.stream("POST", f"{self.url}/v1/chat/completions", json=self.body()) as response:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert json.loads(await response.aread())["error"]["type"] == "rate_limit_error"
                return "429"
            assert response.status_code == 200, await response.aread()
            if self.leaves:
                async for _ in response.aiter_lines():
                    return "left"
            text = (await response.aread()).decode()
        if text.startswith("data: "):
            assert text.endswith("data: [DONE]\n\n")
            assert '"error"' not in text
            assert re.search(r'"finish_reason":"(stop|length)"', text)
        else:
            assert json.loads(text)["choices"][0]["finish_reason"] in ("stop", "length")
        return "ok"


async def storm(url, clients, seconds):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        until = time.monotonic() + seconds
        crowd = [Client(place, http, url, until) for place in range(clients)]
        await asyncio.gather(*(client.run() for client in crowd))
    return sum((client.counts for client in crowd), Counter()), sorted(s for client in crowd for s in client.seconds)


@pytest.fixture
def process(tmp_path, models):
    """`s2t serve` as a process, with an adapter that selects now and then."""
    models[1].save(tmp_path / "adapter")
    command = [sys.executable, "-m", "s2t", "serve", "--adapter", str(tmp_path / "adapter"), "--port", "0"]
    command += ["--batch-size", "32", "--max-queue", "64", "--max-length", "512"]
    started, url = start(command, tmp_path / "log")
    yield started, url, tmp_path / "log"
    started.kill()
    started.wait(20)


def start(command, log, **environment):
    """A server process, and its address once it has said that."""
    with log.open("w") as file:
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        started = subprocess.Popen(command, stderr=file, stdout=file, env=settings)
    until = time.monotonic() + 180
    while not (found := re.search(r"http://\S+", log.read_text())) and time.monotonic() < until:
        time.sleep(0.1)
    assert found, log.read_text()
    return started, found.group()


def metric(url, name):
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


@pytest.mark.slow
def test_two_hundred_clients_for_a_minute(process, capsys):
    started, url, log = process
    memory = psutil.Process(started.pid)
    rss = [memory.memory_info().rss]
    asyncio.run(storm(url, CLIENTS, WARM_UP_S))  # every store has grown to what it needs
    rss.append(memory.memory_info().rss)
    before = metric(url, "s2t_generated_tokens_total")
    parts = max(2, round(SECONDS / 60))
    counts, seconds = Counter(), []
    for _ in range(parts):
        found = asyncio.run(storm(url, CLIENTS, SECONDS / parts))
        counts, seconds = counts + found[0], sorted(seconds + found[1])
        rss.append(memory.memory_info().rss)
    tokens = metric(url, "s2t_generated_tokens_total") - before
    until = time.monotonic() + 20
    while httpx.get(f"{url}/health").json() != {"status": "ok", "running": 0, "waiting": 0}:
        assert time.monotonic() < until, "a row is still taken"
        time.sleep(0.1)
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {SECONDS:g} s: {dict(counts)}, {tokens / SECONDS:.0f} tokens/s,")
        print(f"seconds per answer: median {seconds[len(seconds) // 2]:.2f}, longest {seconds[-1]:.2f};")
        print(f"resident MiB at start, after {WARM_UP_S:g} s, and every {SECONDS / parts:g} s:", end=" ")
        print([round(size / 2**20) for size in rss])
    assert counts["ok"] > CLIENTS
    assert counts["left"] > 10
    assert set(counts) <= {"ok", "429", "left"}
    assert rss[-1] - rss[1] < 0.05 * rss[1]
    assert "Traceback" not in log.read_text()
    started.terminate()
    assert started.wait(40) == 0


def test_a_process_stops_when_asked_and_says_nothing_of_its_key(tmp_path):
    key = "sk-process-8d777f38"
    started, url = start([sys.executable, "-m", "s2t", "serve", "--port", "0"], tmp_path / "log", S2T_API_KEY=key)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    answer = httpx.post(
        f"{url}/v1/completions",
        json={"model": "tiny:slm", "prompt": "Ava", "max_tokens": 4},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert answer.status_code == 200
    started.terminate()
    assert started.wait(40) == 0
    said = (tmp_path / "log").read_text()
    assert key not in said
    assert "Traceback" not in said
