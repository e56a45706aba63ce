"""What the server refuses, limits and survives: errors in the OpenAI shape, the key, the queue, clients that leave, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from s2t.cli import main as cli
from s2t.config import ServeConfig
from s2t.decode.pair import Pair
from s2t.errors import ConfigError, S2TError
from s2t.serve import run
from s2t.serve.run import build, check_address, read_key
from s2t.serve.worker import Worker

NAME = "tiny:slm"
USER = [{"role": "user", "content": "Ava has 3 apples and buys 4 more. How many apples has she?"}]
CHAT = {"model": NAME, "messages": USER, "max_tokens": 4}
COMPLETION = {"model": NAME, "prompt": "Ava has", "max_tokens": 4}
LONG = {"model": f"{NAME}:greedy", "prompt": [5], "max_tokens": 500}
KEY = "sk-test-0123456789abcdef"


def post(server, body, path="/v1/chat/completions", **settings):
    kind = {"content": body} if isinstance(body, (bytes, str)) else {"json": body}
    headers = {"content-type": "application/json"} | settings.pop("headers", {})
    return httpx.post(server.url + path, headers=headers, timeout=30, **kind, **settings)


def error_of(response):
    """The error of a response, whose shape is checked."""
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text
    assert "\n" not in body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"frobnicate": 1}, "frobnicate", "not a parameter"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": "x", "names": "a"}]}, "messages.0.names", "not a parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0", "role user must be text"),
        ({"messages": [{"role": "system"}, *USER]}, "messages.0", "role system must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "surrogate"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 10**6}, "n", "less than or equal"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal"),
        ({"max_tokens": 5000}, "messages", "up to 512 tokens"),
        ({"max_completion_tokens": 5}, "max_tokens", "same limit"),
        ({"stop": "x" * 257}, "stop", "at most 256"),
        ({"verbosity": "much"}, "verbosity", "'high'"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "'max'"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "cannot set tools"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "dictionary"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "leave it at 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"s2t": {"strategy": "nonsense"}}, "s2t.strategy", "not served"),
        ({"s2t": {"strategy": "self-consistency"}}, "s2t.strategy", "not served"),
        ({"s2t": {"detail": True}}, "s2t.detail", "not a parameter"),
        ({"s2t": {"strategy": "s2t-local"}, "temperature": 1}, "temperature", "takes no samples"),
        ({"s2t": {"strategy": "sample"}, "temperature": 0}, "temperature", "above 0"),
        ({"s2t": {"strategy": "greedy"}, "model": f"{NAME}:llm"}, "s2t.strategy", "give one"),
    ],
)
def test_a_mistake_is_named_and_refused(server, change, param, says):
    response = post(server, json.dumps(CHAT | change))
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "someone", "n": 1},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "metadata": {}},
        {"stream": False, "stream_options": None, "stop": [], "seed": None, "temperature": None, "logprobs": False},
        {"service_tier": "auto", "parallel_tool_calls": True, "top_p": 1, "temperature": 0},
    ],
)
def test_known_fields_that_change_nothing_are_taken(server, change):
    assert post(server, CHAT | change).status_code == 200


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], ["a", 1], [1, "a"], [-1], [1.5], [True], [10**30], [999999], {"a": 1}, None, [[1], []]],
)
def test_a_prompt_that_is_none_is_refused(server, prompt):
    response = post(server, COMPLETION | {"prompt": prompt}, "/v1/completions")
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


@pytest.mark.parametrize(
    "change", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"logprobs": 21}, {"logprobs": True}]
)
def test_what_plain_completions_cannot_do_is_refused(server, change):
    response = post(server, COMPLETION | change, "/v1/completions")
    assert response.status_code == 400
    assert error_of(response)["param"] == next(iter(change))


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"nonsense", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{}" * 9, b"[" * 100_000),
        *(b'{"seed": ' + b"9" * 9999, json.dumps(CHAT).encode() + b"x", b'{"temperature": NaN}'),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server, body):
    response = post(server, body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_page_elsewhere_cannot_post_without_asking(server, kind):
    """A browser sends these kinds across sites without a preflight; only JSON is read."""
    response = post(server, json.dumps(CHAT), headers={"content-type": kind})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/nothing"), ("GET", "/assets/../app.py"), ("GET", "/assets/app.py")]
)
def test_a_path_that_is_none_is_not_found(server, method, path):
    response = httpx.request(method, server.url + path)
    assert response.status_code == 404
    error_of(response)


def test_a_method_that_a_path_does_not_take_is_refused(server):
    response = httpx.get(f"{server.url}/v1/completions")
    assert response.status_code == 405
    error_of(response)


def test_the_official_client_raises_its_own_errors(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="takes no samples"):
        client.chat.completions.create(model=f"{NAME}:greedy", messages=USER, temperature=1)
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=USER)
    with pytest.raises(openai.BadRequestError, match="up to 512 tokens") as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "word " * 600}])
    assert caught.value.code == "context_length_exceeded"


def test_more_choices_than_the_server_holds_are_refused(serve):
    with serve(batch_size=2, max_queue=3) as server:
        response = post(server, CHAT | {"n": 6})
        assert response.status_code == 400
        assert "up to 5 choices" in error_of(response)["message"]
        assert post(server, CHAT | {"n": 5}).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(serve, is_chunked):
    with serve(max_body_bytes=1000) as server:
        body = json.dumps(CHAT | {"user": "x" * 2000}).encode()
        parts = (body[i : i + 100] for i in range(0, len(body), 100))
        response = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=parts if is_chunked else body,
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 413
        assert "at most 1000 bytes" in error_of(response)["message"]
        assert post(server, CHAT).status_code == 200


def test_a_client_that_sends_too_slowly_is_let_go(serve, monkeypatch):
    monkeypatch.setattr("s2t.serve.edge.BODY_S", 0.2)
    with serve() as server, socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        client.sendall(head.encode())
        client.settimeout(10)
        assert b"408" in client.recv(100)


def test_without_the_key_nothing_but_page_and_health_is_served(serve, monkeypatch, caplog, capfd):
    monkeypatch.setenv("S2T_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG), serve() as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                response = httpx.get(server.url + path, headers=headers)
                assert response.status_code == 401
                assert error_of(response)["type"] == "authentication_error"
            assert post(server, CHAT, headers=headers).status_code == 401
        assert post(server, b"{", headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client().chat.completions.create(**CHAT)
        client = server.client(api_key=KEY)
        assert client.chat.completions.create(**CHAT).choices
        assert KEY not in httpx.get(f"{server.url}/metrics", headers={"authorization": f"bearer {KEY}"}).text
    assert KEY not in caplog.text
    assert not any(KEY in text for text in capfd.readouterr())


def test_a_key_is_read_from_the_environment_or_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("S2T_API_KEY", raising=False)
    assert read_key(ServeConfig()) is None
    monkeypatch.setenv("S2T_API_KEY", "from-environment")
    assert read_key(ServeConfig()) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert read_key(ServeConfig(api_key_file=str(tmp_path / "key"))) == "from-file"
    for text in ("", "two words", "\u00fc"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(ConfigError, match="printable ASCII"):
            read_key(ServeConfig(api_key_file=str(tmp_path / "key")))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(ServeConfig(api_key_file=str(tmp_path / "missing")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_for_others_needs_a_key(host):
    with pytest.raises(ConfigError, match="S2T_API_KEY"):
        check_address(ServeConfig(host=host), None)
    check_address(ServeConfig(host=host), "key")
    check_address(ServeConfig(host=host, no_auth=True), None)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.9"])
def test_an_address_of_this_machine_needs_none(host):
    check_address(ServeConfig(host=host), None)


def test_the_command_names_a_mistake_before_models_are_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("S2T_API_KEY", raising=False)
    monkeypatch.setattr("s2t.api.open_reasoner", lambda *_, **__: pytest.fail("models were loaded"))
    for words, says in (
        (["--host", "0.0.0.0"], "S2T_API_KEY"),
        (["--api-key-file", str(tmp_path / "none")], "cannot be read"),
        (["--port", "70000"], "port"),
        (["--strategy", "sample"], "strategy"),
        (["--num-samples", "4"], "No such option: --num-samples"),
        (["--max-length", "1"], "max_length"),
    ):
        assert cli.main(["serve", *words]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


def test_a_port_that_is_taken_is_named(tiny_slm):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another --port"):
        run.serve(ServeConfig(port=taken.getsockname()[1]), Pair(tiny_slm))


def test_a_default_strategy_that_lacks_its_model_is_refused_at_the_start(tiny_slm):
    for name, says in (("s2t-local", "adapter"), ("s2t", "--llm"), ("llm", "--llm")):
        with pytest.raises(S2TError, match=says):
            build(ServeConfig(strategy=name), Pair(tiny_slm))


def test_a_strategy_without_its_threshold_is_not_offered(tiny_slm, tiny_llm):
    service, _ = build(ServeConfig(), Pair(tiny_slm, tiny_llm))
    assert list(service.intake.strategies) == ["greedy", "sample", "llm"]
    with pytest.raises(S2TError, match="threshold"):
        build(ServeConfig(strategy="s2t"), Pair(tiny_slm, tiny_llm))


def test_a_full_queue_answers_429_and_says_when_to_come_back(serve):
    with serve(endless=True, batch_size=1, max_queue=1) as server:
        client = server.client()
        with (
            client.completions.create(**LONG, stream=True) as first,
            client.completions.create(**LONG, stream=True) as second,
        ):
            next(iter(first))
            response = post(server, CHAT)
            assert response.status_code == 429
            assert error_of(response)["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 1, "waiting": 1}
            assert second.response.status_code == 200
        assert server.idle()
        assert post(server, CHAT).status_code == 200


def test_clients_that_hang_up_free_their_rows(serve):
    with serve(endless=True, batch_size=2, max_queue=8) as server:
        client = server.client()
        streams = [client.completions.create(**LONG, stream=True) for _ in range(6)]  # two run, four wait
        next(iter(streams[0]))
        for stream in streams:
            stream.close()
        assert server.idle(5)
        decoder = server.service.backend._decoders["greedy"]
        assert not decoder.batch.rows
        assert not decoder.batch.waiting
        assert not decoder.costs
        assert not server.service._answers
        assert "s2t_cancelled_sequences_total 6.0" in httpx.get(f"{server.url}/metrics").text


def test_a_client_that_leaves_before_its_whole_answer_frees_its_rows(serve):
    with serve(endless=True, batch_size=2) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG | {"n": 2}, timeout=httpx.Timeout(30, read=0.15))
        assert server.idle(5)
        assert post(server, CHAT).status_code == 200


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_takes_too_long_ends_with_an_error(serve, is_streamed):
    with serve(endless=True, request_timeout_s=0.2) as server:
        with pytest.raises(openai.APIError, match=r"within 0\.2 s"):
            list(server.client().completions.create(**LONG, stream=is_streamed))
        assert server.idle(5)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_failure_of_the_engine_ends_its_requests_and_not_the_server(serve, monkeypatch, caplog, is_streamed):
    with serve(endless=True) as server:
        assert post(server, COMPLETION | {"model": f"{NAME}:greedy"}, "/v1/completions").status_code == 200
        decoder = server.service.backend._decoders["greedy"]
        monkeypatch.setattr(decoder, "_round", lambda: 1 / 0)
        with caplog.at_level(logging.ERROR), pytest.raises(openai.APIError, match="the engine failed") as caught:
            list(server.client().completions.create(**LONG, stream=is_streamed))
        assert "ZeroDivisionError" in caplog.text
        assert "ZeroDivision" not in str(caught.value.body)
        assert post(server, COMPLETION | {"model": f"{NAME}:greedy"}, "/v1/completions").status_code == 200
        assert server.idle()


def test_a_failure_of_the_server_shows_no_traceback(serve, monkeypatch, caplog):
    with serve() as server:
        monkeypatch.setattr(server.service, "open", lambda *_: 1 / 0)
        with caplog.at_level(logging.ERROR):
            response = post(server, CHAT)
        assert response.status_code == 500
        assert "ZeroDivision" not in response.text
        assert error_of(response)["type"] == "server_error"
        assert response.headers["cache-control"] == "no-store"
        text = httpx.get(f"{server.url}/metrics").text
        assert 's2t_requests_total{path="/v1/chat/completions",status="500"} 1.0' in text


def test_a_stopping_server_finishes_what_runs_and_takes_nothing_new(serve):
    with serve(endless=True, batch_size=2) as server:
        client, asked = server.client(), LONG | {"max_tokens": 120}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.completions.create, **asked)
            while not server.service.num_running:
                time.sleep(0.01)
            server.service.worker.drain()
            response = post(server, CHAT)
            assert response.status_code == 503
            assert error_of(response)["code"] == "stopping"
            assert httpx.get(f"{server.url}/health").json()["status"] == "draining"
            assert answer.result().usage.completion_tokens == 120


def test_what_is_not_done_when_draining_ends_is_told_so(serve):
    with serve(endless=True) as server:
        loop = server.service._loop
        with server.client().completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
            asyncio.run_coroutine_threadsafe(server.service.drain(0.1), loop)
            with pytest.raises(openai.APIError, match="stopping"):
                list(stream)
        assert server.idle()


def test_an_engine_thread_that_dies_fails_loudly(caplog):
    """Jobs are told, health says so, and nothing new is taken."""

    class Broken:
        num_rows, num_waiting, is_busy = 1, 0, True

        def step(self):
            raise RuntimeError("no more")

        def add(self, job):
            pass

    told = threading.Event()
    worker = Worker(Broken(), 1, lambda events: told.set())  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR):
        worker.start()
        worker._thread.join(5)
    assert not worker.is_alive
    assert "engine thread failed" in caplog.text


def test_metrics_count_what_was_done(serve):
    with serve() as server:
        post(server, CHAT)
        post(server, CHAT | {"n": 0})
        httpx.get(f"{server.url}/v1/x/{'y' * 50}")
        text = httpx.get(f"{server.url}/metrics").text
        assert 's2t_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
        assert 's2t_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
        assert 's2t_requests_total{path="other",status="404"} 1.0' in text
        assert 's2t_generated_tokens_total{strategy="s2t-local"} 4.0' in text
        assert "s2t_first_token_seconds_count 1.0" in text
        assert "s2t_running_sequences 0.0" in text


def test_the_page_and_every_answer_forbid_what_they_do_not_need(server):
    response = httpx.get(f"{server.url}/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    for name in ("playground.css", "playground.js"):
        assert f"assets/{name}" in response.text
        assert httpx.get(f"{server.url}/assets/{name}").status_code == 200
