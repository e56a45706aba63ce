"""The client against a server that fails in every way: nothing lost, nothing doubled, everything counted."""

from __future__ import annotations

import re
import threading
import time

import pytest

from s2t.decode.remote.blocking import BlockingClient
from s2t.decode.remote.client import RemoteSettings, api_key_from
from s2t.decode.remote.counts import ClientCounts, Prices
from s2t.decode.remote.wire import BadReply, CompletionRequest, parse_completion
from s2t.errors import ConfigError, RemoteError

QUICK = {"timeout_s": 20.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "max_retries": 20, "patience_s": 5.0}


def settings(*urls: str, **changes) -> RemoteSettings:
    return RemoteSettings(urls, **{**QUICK, **changes})


def requests(count: int) -> list[CompletionRequest]:
    return [CompletionRequest([i, 7, 1000], logprobs=1) for i in range(count)]


def test_every_request_is_answered_once_and_in_order_through_all_faults(serve, echo_answers):
    server = serve(echo_answers, fault_rate=0.4, faults=("429", "500", "garbage", "half", "reset", "wrong"))
    with BlockingClient(settings(server.url, max_in_flight=32, timeout_s=20.0)) as client:
        done = client.complete_all(requests(200))
    assert [each.token_ids for each in done] == [[i + 1007] for i in range(200)]
    counts, spoilt = client.counts, server.spoilt
    assert counts.calls == server.answered == 200
    assert counts.prompt_tokens == 600
    expected = {
        "429": spoilt["429"],
        "5xx": spoilt["500"],
        "bad reply": spoilt["garbage"] + spoilt["wrong"],
        "connection": spoilt["half"] + spoilt["reset"],
    }
    assert dict(counts.retries) == expected
    assert all(expected.values())


def test_requests_that_are_never_answered_are_made_again(serve, echo_answers):
    server = serve(echo_answers, fault_rate=0.3, faults=("timeout",), hang_s=10.0)
    with BlockingClient(settings(server.url, timeout_s=0.4)) as client:
        done = client.complete_all(requests(30))
    assert [each.token_ids for each in done] == [[i + 1007] for i in range(30)]
    assert client.counts.retries["timeout"] >= server.spoilt["timeout"] > 0


def test_requests_in_flight_are_bounded(serve, echo_answers):
    server = serve(echo_answers, delay_s=0.01)
    with BlockingClient(settings(server.url, max_in_flight=5)) as client:
        client.complete_all(requests(40))
    assert server.most_in_flight == 5


def test_servers_share_the_requests(serve, echo_answers):
    first, second = serve(echo_answers, delay_s=0.01), serve(echo_answers, delay_s=0.01)
    with BlockingClient(settings(first.url, second.url, model="llm", max_in_flight=16)) as client:
        client.complete_all(requests(80))
        assert client.calls_by_server == {first.url: first.answered, second.url: second.answered}
    assert first.answered + second.answered == 80
    assert abs(first.answered - second.answered) <= 8


def test_requests_of_one_key_go_to_one_server(serve, echo_answers):
    first, second = serve(echo_answers), serve(echo_answers)
    with BlockingClient(settings(first.url, second.url)) as client:
        for key in "abcdef":
            before = first.answered, second.answered
            client.complete_all([CompletionRequest([3], key=key) for _ in range(6)])
            assert 0 in (first.answered - before[0], second.answered - before[1])
    assert first.answered
    assert second.answered


def test_a_dead_server_is_drained_its_requests_go_elsewhere_and_it_comes_back(serve, echo_answers):
    first, second = serve(echo_answers, delay_s=0.02), serve(echo_answers, delay_s=0.02)
    with BlockingClient(settings(first.url, second.url, max_in_flight=16)) as client:
        threading.Timer(0.1, lambda: setattr(second, "is_dead", True)).start()
        done = client.complete_all(requests(200))
        assert [each.token_ids[0] for each in done] == [i + 1007 for i in range(200)]
        assert client.counts.drained[second.url] >= 1
        assert client.counts.calls == 200 <= first.answered + second.answered
        second.is_dead = False
        deadline, before = time.monotonic() + 10, second.answered
        while second.answered == before and time.monotonic() < deadline:
            client.complete_all(requests(8))
            time.sleep(0.05)
        assert second.answered > before


def test_a_server_that_hangs_loses_what_it_holds_to_the_others(serve, echo_answers):
    well, hanging = serve(echo_answers), serve(echo_answers, fault_rate=1.0, faults=("timeout",), hang_s=30.0)
    with BlockingClient(settings(well.url, hanging.url, timeout_s=1.0, max_in_flight=40)) as client:
        start = time.monotonic()
        done = client.complete_all(requests(60))
        seconds = time.monotonic() - start
    assert len(done) == 60 <= well.answered
    assert client.counts.drained == {hanging.url: 1}
    assert seconds < 5.0


def test_no_server_at_all_is_one_clear_error(serve, echo_answers):
    server = serve(echo_answers)
    server.is_dead = True
    with (
        BlockingClient(settings(server.url, model="llm", patience_s=0.3)) as client,
        pytest.raises(RemoteError, match=r"no server has answered for 0 s .*connection.*rerun, which resumes"),
    ):
        client.complete_all(requests(5))


def test_attempts_end_with_the_last_cause(serve, echo_answers):
    server = serve(echo_answers, fault_rate=1.0, faults=("429",))
    with (
        BlockingClient(settings(server.url, max_retries=2)) as client,
        pytest.raises(RemoteError, match=r"failed 3 times, at last with 429 \(HTTP 429 not now\)"),
    ):
        client.complete(CompletionRequest([1]))
    assert server.spoilt["429"] == 3


@pytest.mark.parametrize("header", ["0.4", "date"])
def test_retry_after_is_honoured(serve, echo_answers, header):
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    server = serve(echo_answers, fault_rate=1.0, faults=("429",))
    at = datetime.now(UTC) + timedelta(seconds=2)
    server.retry_after = header if header != "date" else format_datetime(at, usegmt=True)
    with BlockingClient(settings(server.url, max_retries=3, max_backoff_s=1.0)) as client:
        threading.Timer(0.1, lambda: setattr(server, "fault_rate", 0.0)).start()
        start = time.monotonic()
        client.complete(CompletionRequest([1]))
        assert time.monotonic() - start >= 0.4


def test_keys_are_sent_and_never_shown(serve, echo_answers, monkeypatch):
    server = serve(echo_answers, api_key="s3cret")
    monkeypatch.setenv("MY_KEY", "s3cret")
    good = settings(server.url, api_key=api_key_from("MY_KEY"))
    assert "s3cret" not in repr(good)
    with BlockingClient(good) as client:
        assert client.complete(CompletionRequest([5])).token_ids == [5]
    monkeypatch.setenv("MY_KEY", "wr0ng")
    with (
        BlockingClient(settings(server.url, api_key=api_key_from("MY_KEY"))) as client,
        pytest.raises(RemoteError, match="put a valid key") as error,
    ):
        client.complete(CompletionRequest([5]))
    assert "wr0ng" not in str(error.value)
    assert api_key_from("NO_SUCH_VARIABLE") is None
    assert api_key_from(None) is None


def test_an_error_that_a_retry_cannot_mend_is_raised_at_once_without_the_key(serve):
    def refuse(body):
        return 400, {"error": {"message": "prompt too long, key k3y"}}

    server = serve(refuse)
    with (
        BlockingClient(settings(server.url, api_key="k3y", model="llm")) as client,
        pytest.raises(RemoteError, match=r"HTTP 400: prompt too long, key \*\*\*; check the request"),
    ):
        client.complete(CompletionRequest([1]))
    assert server.answered == 1
    assert not client.counts.retries


def test_the_model_is_the_one_that_is_served(serve, echo_answers):
    adapters = ({"id": "base"}, {"id": "lora", "parent": "base"})
    server = serve(echo_answers, models=adapters)
    with BlockingClient(settings(server.url)) as client:
        assert client.model_name() == "base"
        client.complete(CompletionRequest([1], model="lora"))
    assert server.bodies[0]["model"] == "lora"
    two = serve(echo_answers, models=({"id": "a"}, {"id": "b"}))
    with (
        BlockingClient(settings(two.url)) as client,
        pytest.raises(ConfigError, match="it serves a, b; pass --llm-model"),
    ):
        client.model_name()


@pytest.mark.parametrize(
    "url",
    [
        *(
            "127.0.0.1:8000",
            "ftp://host/v1",
            "http://user:pass@host/v1",
            "http://h/v1?key=1",
            "ftp://user:pass@host/v1",
        ),
        *("http://127.0.0.1:abc/v1", "http://[::1/v1", "http://127.0.0.1:99999/v1"),
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="a server's URL must") as error:
        RemoteSettings((url,))
    assert "pass" not in str(error.value)


def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("MY_KEY", " s3cret\n")
    assert api_key_from("MY_KEY") == "s3cret"
    monkeypatch.setenv("MY_KEY", "s3cr\u00e9t")
    for make in (lambda: api_key_from("MY_KEY"), lambda: RemoteSettings(("http://h/v1",), api_key="s3cr\net")):
        with pytest.raises(ConfigError, match="printable ASCII") as error:
            make()
        assert "s3cr" not in str(error.value)


def test_what_is_fresh_is_made_anew_for_each_attempt(serve, echo_answers):
    faults, names = iter([500, 429]), iter("abc")

    def answer(body):
        status = next(faults, 200)
        return (status, {"error": {"message": "not now"}}) if status != 200 else echo_answers(body)

    server = serve(answer)
    with BlockingClient(settings(server.url)) as client:
        client.complete(CompletionRequest([5], fresh=lambda: {"user": next(names)}))
    assert [body["user"] for body in server.bodies] == ["a", "b", "c"]


def test_costs_count_cached_tokens_apart():
    counts = ClientCounts()
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 600}}
    counts.add(usage)
    counts.add(None)
    assert counts.calls == 2
    assert counts.cost(Prices(2.0, 8.0)) == pytest.approx((1000 * 2.0 + 10 * 8.0) / 1e6)
    assert counts.cost(Prices(2.0, 8.0, 0.5)) == pytest.approx((400 * 2.0 + 600 * 0.5 + 10 * 8.0) / 1e6)
    assert "cost" not in counts.as_dict(Prices())
    assert counts.as_dict(Prices(1.0))["cost"] == pytest.approx(0.001)


def test_replies_are_read_in_the_shapes_that_servers_use():
    request = CompletionRequest([1, 2], logprobs=2)
    ids = {"top_logprobs": [{"token_id:5": -0.1, "token_id:6": -9999.0}], "tokens": ["token_id:5"]}
    done = parse_completion({"choices": [{"logprobs": ids}]}, request)
    assert done.token_ids == [5]
    assert done.logprobs == [{5: -0.1, 6: float("-inf")}]
    chat = {
        "content": [{"token": "a", "id": 5, "logprob": -1, "top_logprobs": [{"token": "b", "id": 6, "logprob": -2}]}]
    }
    assert parse_completion({"choices": [{"logprobs": chat}]}, request).logprobs == [{6: -2.0}]
    texts = {"top_logprobs": [{"a": -0.1, "??": -3.0}], "tokens": ["a"]}
    assert parse_completion({"choices": [{"logprobs": texts}]}, request, {"a": 4}.get).logprobs == [{4: -0.1}]


@pytest.mark.parametrize(
    "reply",
    [{}, [], {"choices": [{}]}, {"choices": [{"logprobs": {"top_logprobs": [{"token_id:x": 0}]}}]}, "text", None],
)
def test_a_reply_that_is_no_answer_is_a_bad_reply(reply):
    with pytest.raises(BadReply):
        parse_completion(reply, CompletionRequest([1, 2], logprobs=2))


def test_missing_prompt_logprobs_and_missing_ids_are_bad_replies():
    row = {"top_logprobs": [{"token_id:5": -0.1}], "tokens": ["token_id:5"]}
    with pytest.raises(BadReply, match=re.escape("log-probabilities of 0 prompt tokens, expected 2")):
        parse_completion({"choices": [{"logprobs": row}]}, CompletionRequest([1, 2], prompt_logprobs=2))
    with pytest.raises(BadReply, match="listed ids are missing"):
        parse_completion({"choices": [{"logprobs": row}]}, CompletionRequest([1, 2], logprob_token_ids=[5, 6]))
