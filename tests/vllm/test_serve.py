"""`s2t serve` with a real vLLM server behind it: tokens as of the model in this process, requests that end with their client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from s2t.api import load
from s2t.tasks.problems import load_task

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

COUNT, TOKENS = 40, 96


@pytest.fixture(scope="module")
def address(serve_vllm: Any, merged: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The URL of a server in a process of its own, and the vLLM server behind it."""
    behind, log = serve_vllm(merged("always")), tmp_path_factory.mktemp("serve") / "log"
    words = ["--slm", merged("always"), "--slm-url", behind.url, "--served-name", "tiny", "--port", "0"]
    with log.open("w") as file:
        command = [sys.executable, "-m", "s2t", "serve", *words, "--threshold", "0.7", "--max-queue", "64"]
        process = subprocess.Popen(command, stderr=file, stdout=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 180
    while not (found := re.search(r"http://\S+", log.read_text())) and time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    assert found, log.read_text()
    yield found.group(), behind
    process.terminate()
    assert process.wait(40) == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    return [task.prompt(problem) for problem in task.problems("test", COUNT, 0)]


def ask(client: Any, strategy: str, prompt: str, is_streamed: bool) -> str:
    asked = {"model": f"tiny:{strategy}", "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS}
    if not is_streamed:
        return client.chat.completions.create(**asked).choices[0].message.content
    return "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
    )


@pytest.mark.parametrize("strategy", ["s2t-local", "greedy"])
def test_answers_are_those_of_the_model_in_this_process(address, merged, prompts, strategy):
    client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0)
    threshold = {"threshold": 0.7} if strategy == "s2t-local" else {}
    wanted = load(merged("always")).generate(prompts, strategy, max_new_tokens=TOKENS, **threshold)
    start = time.monotonic()
    with ThreadPoolExecutor(COUNT) as pool:
        found = list(pool.map(lambda i: ask(client, strategy, prompts[i], i % 2 == 0), range(COUNT)))
    tokens, seconds = sum(len(one.token_ids) for one in wanted), time.monotonic() - start
    flips = sum(one.num_flips for one in wanted)
    print(
        f"\n{strategy}: {COUNT} problems, {tokens} tokens, {flips} flips, {tokens / seconds:.0f} tokens/s", flush=True
    )
    assert found == [one.text for one in wanted]


def test_clients_that_hang_up_leave_nothing_running_on_vllm(address, prompts):
    url, behind = address
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for prompt in prompts[:8]:
            asked = {"model": "tiny:greedy", "messages": [{"role": "user", "content": prompt}], "max_tokens": 300}
            stream = client.chat.completions.create(**asked, stream=True)
            next(iter(stream))
            stream.close()
    until = time.monotonic() + 10
    while running(behind) or httpx.get(f"{url}/health").json()["running"]:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "s2t_cancelled_sequences_total" in httpx.get(f"{url}/metrics").text


def running(behind: Any) -> float:
    text = httpx.get(behind.url.removesuffix("/v1") + "/metrics").text
    return sum(map(float, re.findall(r"^vllm:num_requests_running{.*} (\S+)$", text, re.MULTILINE)))


def test_a_server_that_is_killed_is_said(address):
    url, behind = address
    assert httpx.get(f"{url}/health").status_code == 200
    behind.kill()
    with pytest.raises(openai.InternalServerError, match="do not answer"):
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), "greedy", "2 + 2 = ?", False)
    assert httpx.get(f"{url}/health").json()["status"] == "unreachable"
