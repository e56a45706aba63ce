"""Prompts, heads and origins at the door: what is made of a request before the engine has it, and when the server stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from s2t.serve import connection
from s2t.serve.origin import comes_from_here

NAME = "tiny:slm"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "2 + 2 = ?"}], "max_tokens": 4}
COMPLETION = {"model": f"{NAME}:greedy", "prompt": "2 + 2 = ", "max_tokens": 4}
LONG = {"model": f"{NAME}:greedy", "prompt": [5], "max_tokens": 500}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


def post(server, body, path=CHATS, **settings):
    return httpx.post(server.url + path, json=body, **({"timeout": 30} | settings))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


class Gate:
    """Plans wait here until it opens; counts those that were begun."""

    def __init__(self, monkeypatch, intake):
        self.opened, self.begun = threading.Event(), 0
        for name in ("chat", "completion"):
            monkeypatch.setattr(intake, name, self._behind(getattr(intake, name)))

    def _behind(self, make):
        def made(body):
            self.begun += 1
            assert self.opened.wait(30)
            return make(body)

        return made


@pytest.fixture
def gated(serve, monkeypatch):
    """Start a server whose plans wait at a gate."""
    gates = []

    class Started:
        def __init__(self, **settings):
            self.context = serve(**settings)

        def __enter__(self):
            server = self.context.__enter__()
            gates.append(Gate(monkeypatch, server.service.intake))
            return server, gates[-1]

        def __exit__(self, *exc):
            gates[-1].opened.set()
            return self.context.__exit__(*exc)

    return Started


# Prompts


@pytest.mark.parametrize("text", ["word " * 200_000, "x" * 1_000_000, " " * 1_000_000, "é" * 400_000, "\n" * 900_000])
def test_what_cannot_fit_is_refused_before_it_is_tokenized(serve, text, monkeypatch):
    with serve(max_body_bytes=2**22) as server:

        def encode(tokenizer, text, add_special_tokens):
            pytest.fail("a text that cannot fit was tokenized")

        monkeypatch.setattr("s2t.model.chat.encode", encode)
        monkeypatch.setattr("s2t.serve.intake.encode", encode)
        said = {}
        said["messages"] = post(server, CHAT | {"messages": [{"role": "user", "content": text}]})
        said["prompt"] = post(server, COMPLETION | {"prompt": text}, TEXTS)
        for param, response in said.items():
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
            assert error["param"] == param and "at least" in error["message"] and "up to 512" in error["message"]


def test_ids_that_cannot_fit_are_refused_before_anything_reads_them(serve, monkeypatch):
    with serve() as server:
        monkeypatch.setattr(server.service.intake.pair, "request_of_ids", lambda *_: pytest.fail("they were read"))
        response = post(server, COMPLETION | {"prompt": [5] * 5000}, TEXTS)
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_prompts_of_clients_that_hung_up_are_not_tokenized(gated):
    with gated() as (server, gate):
        for _ in range(25):
            with pytest.raises(httpx.ReadTimeout):
                post(server, CHAT, timeout=httpx.Timeout(30, read=0.02))
        until(lambda: not server.service.num_waiting)
        assert gate.begun == 1  # the first one, which is being made
        gate.opened.set()
        assert post(server, CHAT).status_code == 200
        assert gate.begun == 2
        assert server.idle()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_time_of_a_request_begins_when_it_comes(gated, is_streamed):
    with gated(request_timeout_s=0.2) as (server, _):
        response = post(server, CHAT | {"stream": is_streamed})
        assert response.status_code == 504
        assert "within 0.2 s" in response.json()["error"]["message"]


def test_prompts_that_wait_to_be_tokenized_fill_the_queue(gated):
    with gated(batch_size=1, max_queue=2) as (server, gate), ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(post, server, CHAT) for _ in range(3)]
        until(lambda: server.service.num_waiting == 3)
        assert httpx.get(f"{server.url}/health").json()["waiting"] == 3
        refused = post(server, CHAT)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert [one.result().status_code for one in asked] == [200] * 3


def test_a_prompt_that_is_being_made_when_draining_begins_gets_its_answer(gated):
    with gated() as (server, gate), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, CHAT)
        until(lambda: gate.begun)
        drained = asyncio.run_coroutine_threadsafe(server.service.drain(20), server.service._loop)
        until(lambda: server.service.status == "draining")
        assert post(server, CHAT).json()["error"]["code"] == "stopping"
        gate.opened.set()
        assert asked.result().status_code == 200
        drained.result()


def test_prompts_that_are_being_made_when_draining_ends_are_told_so(gated):
    with gated() as (server, gate), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(post, server, CHAT) for _ in range(2)]
        until(lambda: server.service.num_waiting == 2)
        asyncio.run_coroutine_threadsafe(server.service.drain(0), server.service._loop).result()
        assert [one.result().json()["error"]["code"] for one in asked] == ["stopping"] * 2
        assert not gate.opened.is_set()


# Origins


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:8000", "LOCALHOST.", "[::1]:80", "127.3.2.1", "app.localhost:1"]
)
def test_names_of_this_machine_are_served(server, host):
    assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0:8000"),
        *("192.168.1.5", "[::]", "notlocalhost", "127.0.0.1@evil.example", "127.0.0.1:x", "", "2130706433"),
    ],
)
def test_a_page_that_gives_this_machine_a_name_of_its_own_is_refused(server, host):
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/v1/models"), ("POST", CHATS)):
        response = httpx.request(method, server.url + path, headers={"host": host}, json=CHAT)
        assert response.status_code == 403, path
        assert response.json()["error"]["code"] == "forbidden_host"


@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:8000", "null", "file://", "x"])
def test_a_page_of_another_origin_is_refused(server, origin):
    response = httpx.post(server.url + CHATS, json=CHAT, headers={"origin": origin})
    assert response.status_code == 403
    for own in (server.url, "http://localhost:3000"):
        assert httpx.post(server.url + CHATS, json=CHAT, headers={"origin": own}).status_code == 200


def test_with_a_key_or_for_others_any_name_is_served(serve, monkeypatch):
    with serve(host="0.0.0.0", no_auth=True) as server:
        assert httpx.get(f"{server.url}/health", headers={"host": "models.example"}).status_code == 200
    monkeypatch.setenv("S2T_API_KEY", "sk-1")
    with serve() as server:
        assert httpx.get(f"{server.url}/health", headers={"host": "models.example"}).status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers={"host": "models.example"}).status_code == 401


def test_the_name_that_a_server_listens_on_is_its_own():
    assert comes_from_here([(b"host", b"Box.Local:80")], "box.local")
    assert comes_from_here([], "127.0.0.1")  # HTTP/1.0
    assert not comes_from_here([(b"host", b"box.local:80")], "127.0.0.1")


# Heads


def connected(server):
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    client.settimeout(10)
    return client


def counted(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("s2t_slow_connections_total"))


@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", b"GET / HTTP/1.1\r\n"])
def test_a_head_that_does_not_end_is_closed_and_counted(serve, monkeypatch, sent):
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    with serve() as server:
        with connected(server) as client:
            client.sendall(sent)
            assert client.recv(100).startswith(b"HTTP/1.1 408")
            assert client.recv(100) == b""
        assert counted(server) == 1
        assert 's2t_requests_total{path="other",status="408"} 1.0' in httpx.get(f"{server.url}/metrics").text


def test_a_head_that_trickles_in_gets_no_longer(serve, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    with serve() as server, connected(server) as client:
        with pytest.raises(OSError):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            for _ in range(1000):
                client.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        assert counted(server) == 1


def test_a_connection_that_says_nothing_is_closed(serve, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    with serve() as server:
        with connected(server) as client:
            assert client.recv(100) == b""
        assert counted(server) == 0


def test_the_second_head_of_a_connection_has_a_limit_too(serve, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    with serve() as server, connected(server) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /v1/mod")
        until(lambda: counted(server) == 1)


def test_an_answer_may_take_longer_than_a_head(serve, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.05)
    with serve(endless=True) as server:
        response = httpx.post(server.url + TEXTS, json=LONG, timeout=60)
        assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 500
        assert counted(server) == 0


# The end


def test_health_says_that_the_server_drains_until_it_has(serve):
    with serve(endless=True, drain_s=20.0) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, LONG, TEXTS, timeout=60)
        until(lambda: server.service.num_running)
        server.server.should_exit = True
        until(lambda: server.service.status == "draining")
        health = httpx.get(f"{server.url}/health")  # over a new connection
        assert health.status_code == 503 and health.json()["status"] == "draining"
        assert post(server, CHAT).json()["error"]["code"] == "stopping"
        assert asked.result().json()["usage"]["completion_tokens"] == 500


def test_what_runs_when_draining_ends_is_told_so_and_the_server_is_gone(serve):
    with serve(endless=True, drain_s=0.1, max_length=1024) as server, connected(server) as half_sent:
        half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        with server.client().completions.create(**LONG | {"max_tokens": 1000, "n": 8}, stream=True) as stream:
            next(iter(stream))
            server.server.should_exit = True
            with pytest.raises(Exception, match="stopping"):
                list(stream)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_ends_the_command_with_0_whatever_runs(tmp_path):
    words = ["serve", "--port", "0", "--drain-s", "0.2"]
    process = subprocess.Popen([sys.executable, "-m", "s2t", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        body = LONG | {"max_tokens": 1000, "n": 128, "model": NAME, "temperature": 2}
        with ThreadPoolExecutor(1) as pool, connected_to(url) as half_sent:
            half_sent.sendall(b"GET / HTTP/1.1\r\n")
            asked = pool.submit(httpx.post, url + TEXTS, json=body, timeout=60)
            until(lambda: httpx.get(f"{url}/health").json()["running"])
            process.send_signal(signal.SIGTERM)
            assert asked.result().json()["error"]["message"] == "the server is stopping."
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def connected_to(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)))
