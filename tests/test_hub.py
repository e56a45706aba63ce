"""Without a network nothing waits: the hub is asked once, and its libraries go on from their cache."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from s2t import hub

SILENT = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """As without HF_HUB_OFFLINE, at a hub that does not answer, and with nothing known of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", SILENT)
    monkeypatch.setattr(hub, "_ANSWERED", set())
    monkeypatch.setattr(hub, "_ASKED", {})


@pytest.fixture
def server():
    """A hub that answers 404 to everything, and a list of what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_does_not_answer_is_left_alone_for_a_while(monkeypatch):
    with hub.offline_unless_it_answers():
        assert constants.is_offline_mode()
        with hub.offline_unless_it_answers():
            assert constants.is_offline_mode()
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked again"))
    with hub.offline_unless_it_answers():
        assert constants.is_offline_mode()
    hub._ASKED[SILENT] -= 61
    with pytest.raises(pytest.fail.Exception), hub.offline_unless_it_answers():
        pass


def test_what_fails_within_leaves_it_as_it_was():
    with pytest.raises(KeyError), hub.offline_unless_it_answers():
        raise KeyError
    assert not constants.is_offline_mode()


def test_any_answer_is_one_and_is_asked_for_once(server, monkeypatch):
    endpoint, asked = server
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for _ in range(2):
        with hub.offline_unless_it_answers():
            assert not constants.is_offline_mode()
    assert len(asked) == 1


def test_nothing_is_asked_where_it_is_offline_already(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked"))
    with hub.offline_unless_it_answers():
        assert constants.is_offline_mode()
    assert constants.is_offline_mode()


def test_a_model_that_is_not_here_is_one_line_at_once(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": SILENT, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "s2t", "generate", "1 + 1?", "--slm", "somebody/no-such-model"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()  # the hub's client alone would say which tries it makes, for minutes
    assert "somebody/no-such-model is not in the cache and the hub cannot be reached" in line
