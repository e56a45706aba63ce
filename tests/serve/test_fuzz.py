"""Bodies that nobody would send, and requests made from the server's own OpenAPI schema: no 5xx, nothing leaks."""

from __future__ import annotations

import copy
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

KEY = "sk-fuzz-5d41402abc4b2a76"
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
CHAT = {
    "model": "tiny:slm",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
    ],
    "max_tokens": 2,
    "n": 1,
    "stop": ["x", "y"],
    "seed": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "s2t": {"strategy": "sample", "details": True},
    "response_format": {"type": "text"},
}
TEXT = {
    "model": "tiny:slm:greedy",
    "prompt": [5, 6, 7],
    "max_tokens": 2,
    "logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "s2t": {"details": True},
}
ODD = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "\x00", "\ud800", "\U0001f600" * 50, "a" * 3000, "{}", "tiny:slm:", "<|reserved_0|>", "<unused7>"),
    *("<|endoftext|>", "../../etc/passwd", "'; drop", "%s%n", "${jndi:x}"),
    *([], [[]], [[[]]], [1], ["x"], [None], [5, "x"], list(range(600)), {}, {"a": 1}, {"": {}}, [{}]),
]


def places(body, at=()):
    """Paths of everything in a body."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def spoiled(body, rng):
    """The body with one value replaced, removed, doubled or renamed."""
    body = copy.deepcopy(body)
    path = rng.choice(list(places(body)))
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    kind = rng.randrange(5)
    if kind == 0:
        del holder[path[-1]]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "\u0000", "__proto__", "a" * 300, str(path[-1]).upper()])] = holder.pop(path[-1])
    elif kind == 2:
        holder[path[-1]] = [holder[path[-1]]] * rng.randrange(3)
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(ODD))
    return body


def broken(data, rng):
    """The bytes with a few of them changed, lost or added."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        else:
            data[at : at + 1] = rng.choice(
                [b'"', b"{", b"}", b"[", b",", b":", b"\\", b"\x00", b"9", b"e", b"-", b"\xff"]
            )
        if not data:
            break
    return bytes(data)


def malformed(count, seed):
    """(path, body) pairs."""
    rng = random.Random(seed)
    for place in range(count):
        path, body = rng.choice([("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
        for _ in range(rng.randint(0 if place % 2 else 1, 3)):
            body = spoiled(body, rng)
        data = json.dumps(body, ensure_ascii=bool(rng.randrange(8))).encode("utf-8", "surrogatepass")
        yield path, broken(data, rng) if place % 2 else data


def logged_by_us(caplog):
    return [record for record in caplog.records if record.name.startswith("s2t")]


def check_bodies(serve, monkeypatch, caplog, count):
    monkeypatch.setenv("S2T_API_KEY", KEY)
    statuses: dict[int, int] = {}
    with caplog.at_level(logging.DEBUG, "s2t.serve"), serve(max_length=64, max_queue=1000) as server:
        with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
            for path, body in malformed(count, seed=0):
                response = client.post(path, content=body)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code in (200, 400, 404), (response.status_code, path, body)
                assert "Traceback" not in response.text
                assert 'File "' not in response.text
                if response.status_code != 200:
                    error = response.json()["error"]
                    assert list(error) == ["message", "type", "param", "code"]
                    assert error["message"]
        assert server.idle()
        assert not server.service._answers
    assert not logged_by_us(caplog), caplog.text
    assert sum(statuses.values()) == count
    assert statuses[400] > count / 2
    return statuses


def test_malformed_bodies_are_refused_and_nothing_breaks(serve, monkeypatch, caplog):
    check_bodies(serve, monkeypatch, caplog, 300)


@pytest.mark.slow
def test_five_thousand_malformed_bodies(serve, monkeypatch, caplog, capsys):
    statuses = check_bodies(serve, monkeypatch, caplog, 5000)
    with capsys.disabled():
        print(f"\n5,000 malformed bodies: {statuses}")


@pytest.mark.slow
def test_schemathesis_finds_nothing(serve, monkeypatch, caplog, capfd, tmp_path):
    monkeypatch.setenv("S2T_API_KEY", KEY)
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "negative_data_rejection,ignored_auth,unsupported_method"
    )
    with caplog.at_level(logging.DEBUG, "s2t.serve"), serve(max_length=40, max_queue=24) as server:
        done = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json"),
                *("--checks", checks, "-H", f"Authorization: Bearer {KEY}", "--max-examples", "60", "--seed", "1"),
                *("--no-color", "--request-timeout", "60", "--suppress-health-check", "all"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
            cwd=tmp_path,
        )
        assert server.idle(30)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert not logged_by_us(caplog), caplog.text
    logged = capfd.readouterr()
    assert "Traceback" not in logged.err
    assert KEY not in caplog.text + logged.err
