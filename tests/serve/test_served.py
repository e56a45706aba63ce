"""A server whose model runs on other servers: the same tokens, requests that end with their client, an upstream that fails.

The other server is a fake that reads the merged model without a cache.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from s2t.api import load
from s2t.cli import main as cli
from s2t.config import MergeConfig, ServeConfig
from s2t.errors import ConfigError
from s2t.merge import merge
from s2t.model.load import load_model
from s2t.serve.run import build

NAME = "tiny"
QUESTIONS = [
    "Ava has 3 apples and buys 4 more. How many apples has she?",
    "Tom reads 15 pages a day for 6 days.",
    "2 + 2 = ?",
]
TOKENS = 32
KEY = "sk-upstream-2f8a"


@pytest.fixture(scope="module")
def merged(new_adapter, tmp_path_factory):
    """The folder of a merged model that selects often, and a reasoner that runs it in this process."""
    folder = tmp_path_factory.mktemp("served")
    new_adapter(load_model("tiny:slm"), scope="always", criticality="reserved").save(folder / "adapter")
    merge(MergeConfig(adapter=str(folder / "adapter"), out=str(folder / "merged")))
    return str(folder / "merged"), load(str(folder / "merged"))


@pytest.fixture(scope="module")
def answers(merged, fakes):
    """vLLM's replies for the merged model; each body is answered once and remembered."""
    known = {}
    speak = fakes.ModelAnswers(merged[1].pair.slm)

    def answer(body):
        body = {name: value for name, value in body.items() if name != "ignore_eos"}
        if len(body["prompt"]) > 250:
            return 400, {"error": {"message": "too long for us"}}
        key = repr(sorted(body.items()))
        if key not in known:
            known[key] = speak(body)
        return known[key]

    return answer


@pytest.fixture
def upstream(answers, fakes):
    """Start fake servers that notice clients who leave; all end with the test."""
    servers = []

    class Watchful(fakes.FakeServer):
        num_left = 0

        async def _serve(self, reader, writer):
            self._readers = {**getattr(self, "_readers", {}), writer: reader}
            await super()._serve(reader, writer)

        async def _completion(self, writer, body):
            until = time.monotonic() + self.delay_s
            while time.monotonic() < until:
                if self._readers[writer].at_eof():
                    self.num_left += 1
                    return False
                await asyncio.sleep(0.01)
            delay, self.delay_s = self.delay_s, 0.0
            try:
                return await super()._completion(writer, body)
            finally:
                self.delay_s = delay

    def start(**settings):
        servers.append(Watchful(answers, **({"models": ({"id": "merged", "max_model_len": 256},)} | settings)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def serve(merged, running):
    """A server of the merged model on some servers; settings are those of `load` and of the server."""

    @contextmanager
    def start(*urls, load_settings=(), **settings):
        quick = {"max_retries": 6, "patience_s": 0.5} | dict(load_settings)
        pair = load(merged[0], slm_url=list(urls), **quick).pair
        with pair.served_slm.client, running(pair, served_name=NAME, **settings) as server:
            yield server

    return start


def asked(question):
    return [{"role": "user", "content": question}]


def ask(server, question, strategy, **settings):
    settings = {"max_tokens": TOKENS} | settings
    return server.client().chat.completions.create(model=f"{NAME}:{strategy}", messages=asked(question), **settings)


def expected(merged, question, strategy, **settings):
    return merged[1].generate(asked(question), strategy, **({"max_new_tokens": TOKENS} | settings))


@pytest.mark.parametrize("strategy", ["s2t-local", "greedy"])
def test_answers_are_those_of_the_model_in_this_process(merged, upstream, serve, strategy):
    with serve(upstream().url, upstream().url) as server:
        assert [model.id for model in server.client().models.list()] == [NAME, f"{NAME}:s2t-local", f"{NAME}:greedy"]
        with ThreadPoolExecutor(6) as pool:
            wholes = [pool.submit(ask, server, question, strategy) for question in QUESTIONS]
            streams = [pool.submit(lambda q=q: list(ask(server, q, strategy, stream=True))) for q in QUESTIONS]
        for question, whole, stream in zip(QUESTIONS, wholes, streams, strict=True):
            here = expected(merged, question, strategy)
            choice = whole.result().choices[0]
            assert (choice.message.content, choice.finish_reason) == (here.text, here.finish_reason)
            assert whole.result().usage.completion_tokens == len(here.token_ids)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream.result()) == here.text
            assert len([chunk for chunk in stream.result() if chunk.choices[0].delta.content]) > 2
        assert server.idle()


def test_a_selector_of_readout_rank_answers_as_in_this_process(new_adapter, running, fakes, tmp_path):
    new_adapter(load_model("tiny:slm"), "stream", "reserved", "rank").save(tmp_path / "adapter")
    folder = merge(MergeConfig(adapter=str(tmp_path / "adapter"), out=str(tmp_path / "merged")))["folder"]
    here, there = load(folder), load(folder).pair
    speak, asked_of = fakes.ModelAnswers(there.slm), []

    def answer(body):
        asked_of.append(body["model"])
        there.adapter.act(body["model"] == "s2t")
        return speak({name: value for name, value in body.items() if name not in ("ignore_eos", "min_tokens")})

    upstream = fakes.FakeServer(answer, models=({"id": "base"}, {"id": "s2t", "parent": "base"}))
    try:
        pair = load(folder, slm_url=[upstream.url]).pair
        assert not pair.served_slm.has_plugin
        with pair.served_slm.client, running(pair, served_name=NAME) as server:
            asked_of.clear()
            for question in QUESTIONS:
                wanted = here.generate(asked(question), "s2t-local", max_new_tokens=TOKENS)
                assert ask(server, question, "s2t-local").choices[0].message.content == wanted.text
                assert wanted.num_flips > 0
                assert wanted.num_triggered <= asked_of.count("s2t") <= 2 * wanted.num_triggered
                asked_of.clear()
    finally:
        upstream.close()


def test_stops_choices_and_token_ids(merged, upstream, serve):
    with serve(upstream().url) as server:
        whole = expected(merged, QUESTIONS[0], "greedy").text
        stop = whole[len(whole) // 2 :][:4]
        here = expected(merged, QUESTIONS[0], "greedy", stop=stop)
        answer = ask(server, QUESTIONS[0], "greedy", stop=stop, n=2)
        assert [choice.message.content for choice in answer.choices] == [here.text] * 2
        ids = merged[1].pair.slm.tokenizer("Ava has 3")["input_ids"]
        plain = server.client().completions.create(model=f"{NAME}:s2t-local", prompt=ids, max_tokens=9)
        assert plain.choices[0].text == merged[1].complete([ids], "s2t-local", max_new_tokens=9)[0].text


@pytest.mark.parametrize("strategy", ["s2t-local", "greedy"])
def test_details_say_what_the_servers_tell(merged, upstream, serve, strategy):
    with serve(upstream().url) as server:
        answer = ask(server, QUESTIONS[0], strategy, extra_body={"s2t": {"details": True}})
    here = expected(merged, QUESTIONS[0], strategy)
    steps = answer.choices[0].s2t["steps"]
    assert all(0 <= step["criticality"] <= 1 for step in steps)
    for told, step in zip(steps, here.steps, strict=False):
        assert (told["token_id"], told["fired"], told["flip"]) == (step.token_id, step.fired, step.flip)
        assert told["value"] == (None if step.value is None else pytest.approx(step.value, abs=1e-3))
        assert [one["token_id"] for one in told["candidates"] if one["selected"]] == [step.token_id]
        assert all(one["logprob"] <= 0 and (one["score"] is not None) == step.fired for one in told["candidates"])
    if strategy == "s2t-local":
        assert any(step["flip"] for step in steps)


def test_a_triggering_random_draw_is_that_of_its_seed(merged, upstream, serve):
    with serve(upstream().url, trigger="random", threshold=0.5) as server:
        here = expected(merged, QUESTIONS[0], "s2t-local", trigger="random", threshold=0.5, seed=3)
        answer = ask(server, QUESTIONS[0], "s2t-local", seed=3)
    assert answer.choices[0].message.content == here.text
    assert answer.s2t["seed"] == 3


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": 0.7}, "temperature", "take no samples"),
        ({"temperature": 0.7, "s2t": {"strategy": "greedy"}}, "temperature", "takes no samples"),
        ({"s2t": {"strategy": "sample"}}, "s2t.strategy", "not served"),
        ({"s2t": {"strategy": "s2t"}}, "s2t.strategy", "not served"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs", "leave logprobs out"),
        ({"max_tokens": 250}, "messages", "up to 255 tokens"),
    ],
)
def test_what_the_servers_cannot_do_is_refused(upstream, serve, change, param, says):
    body = {"model": NAME, "messages": asked(QUESTIONS[0]), "max_tokens": 4} | change
    with serve(upstream().url) as server:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_clients_that_hang_up_end_the_requests_of_their_answers(upstream, serve):
    there = upstream()
    with serve(there.url, batch_size=2, max_queue=4) as server:
        there.delay_s = 30.0  # from here on: what starts asks as well
        client = server.client()
        streams = [client.chat.completions.create(model=NAME, messages=asked(q), stream=True) for q in QUESTIONS]
        wait_for(lambda: there.in_flight == 2)
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 2, "waiting": 1}
        for stream in streams:
            stream.close()
        assert server.idle()
        wait_for(lambda: there.in_flight == 0)
        assert there.num_left >= 2
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/completions",
                json={"model": NAME, "prompt": "Ava"},
                timeout=httpx.Timeout(30, read=0.3),
            )
        assert server.idle()
        wait_for(lambda: there.in_flight == 0)
        there.delay_s = 0.0
        assert ask(server, QUESTIONS[0], "greedy", max_tokens=4).usage.completion_tokens == 4
        backend = server.service.backend
        assert not backend._open and not backend._stops and not backend._num_running
        assert not any(decoder.readings or decoder.costs or decoder._watched for decoder in backend._decoders.values())


def test_an_upstream_that_is_gone_is_said_and_one_that_is_back_is_used(merged, upstream, serve, monkeypatch, caplog):
    there = upstream(api_key=KEY)
    monkeypatch.setattr("s2t.serve.served._FRESH_S", 0.0)
    monkeypatch.setenv("UPSTREAM_KEY", KEY)
    settings = {"llm_api_key_env": "UPSTREAM_KEY"}
    with caplog.at_level(logging.DEBUG), serve(there.url, load_settings=settings) as server:
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        there.is_dead = True
        with ThreadPoolExecutor(2) as pool:
            asking = [
                pool.submit(lambda how=how: list(ask(server, QUESTIONS[0], "s2t-local", stream=how)))
                for how in (False, True)
            ]
        for how, one in zip((503, None), asking, strict=True):
            error = one.exception()
            assert isinstance(error, openai.APIError) and "do not answer; try again later" in error.message
            assert getattr(error, "status_code", None) == how and there.url not in str(error.body)
        with pytest.raises(openai.InternalServerError, match="do not answer") as caught:  # known by now: told at once
            ask(server, QUESTIONS[0], "s2t-local", stream=True)
        assert caught.value.response.headers["retry-after"] == "5"
        response = httpx.get(f"{server.url}/health")
        assert (response.status_code, response.json()["status"]) == (503, "unreachable")
        there.is_dead = False
        wait_for(lambda: not server.service.backend.is_cut_off, 20)
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        here = expected(merged, QUESTIONS[0], "s2t-local").text
        assert ask(server, QUESTIONS[0], "s2t-local").choices[0].message.content == here
        assert server.idle()
    assert KEY not in caplog.text
    assert "no server has answered" in caplog.text


def test_faults_of_the_upstream_change_no_answer(merged, upstream, serve):
    there = upstream(fault_rate=0.3, faults=("429", "500", "garbage", "half", "reset"))
    with (
        serve(there.url, load_settings={"max_retries": 30, "patience_s": 30.0}) as server,
        ThreadPoolExecutor(3) as pool,
    ):
        found = list(
            pool.map(lambda q: ask(server, q, "s2t-local", max_tokens=12).choices[0].message.content, QUESTIONS)
        )
    assert found == [expected(merged, question, "s2t-local", max_new_tokens=12).text for question in QUESTIONS]
    assert sum(there.spoilt.values()) > 3


def test_a_request_that_the_upstream_refuses_is_no_outage(upstream, serve):
    with serve(upstream(models=({"id": "merged"},)).url) as server:
        long = {"model": f"{NAME}:greedy", "prompt": [40] * 251, "max_tokens": 2}
        response = httpx.post(f"{server.url}/v1/completions", json=long)
        assert response.status_code == 502
        assert "refuse the request" in response.json()["error"]["message"] and "too long" not in response.text
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_a_stopping_server_gives_running_answers_their_time(upstream, serve):
    there = upstream(delay_s=0.3)
    with serve(there.url) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, QUESTIONS[0], "greedy", max_tokens=8)
        wait_for(lambda: server.service.num_running)
        server.service.worker.drain()
        assert httpx.get(f"{server.url}/health").json()["status"] == "draining"
        assert answer.result().usage.completion_tokens == 8


def test_mistakes_are_one_line_before_anything_is_asked(merged, upstream, capsys, monkeypatch):
    monkeypatch.setattr("s2t.api.open_reasoner", lambda *_, **__: pytest.fail("models were loaded"))
    for words, says in (
        (["--llm-url", "http://127.0.0.1:9/v1"], "No such option: --llm-url"),
        (["--slm-url", "http://127.0.0.1:9/v1", "--llm", "tiny:llm"], "drop --llm"),
        (["--slm-url", "http://127.0.0.1:9/v1", "--patience-s", "-1"], "patience_s"),
    ):
        assert cli.main(["serve", *words]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    monkeypatch.undo()
    pair = load(merged[0], slm_url=[upstream().url]).pair
    with pair.served_slm.client:
        for settings, says in (
            ({"strategy": "s2t"}, "drop --slm-url"),
            ({"trigger": "entropy", "threshold": 1.0}, "takes trigger"),
        ):
            with pytest.raises(ConfigError, match=says):
                build(ServeConfig(**settings), pair)
    words = [
        "serve",
        "--slm",
        merged[0],
        "--slm-url",
        "http://127.0.0.1:9/v1",
        "--max-retries",
        "1",
        "--patience-s",
        "0",
    ]
    assert cli.main(words) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def wait_for(holds, seconds=10.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
