"""Mistakes about servers, through the real commands, are one line on stderr and never show a key."""

from __future__ import annotations

import socket

import pytest

from s2t.cli.main import main

SHORT = ["--limit", "2", "--max-new-tokens", "8"]


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run a command that must fail; returns its only line."""
    monkeypatch.setenv("S2T_LLM_API_KEY", "s3cret")

    def run(code, *words):
        assert main([*words, "--out", str(tmp_path / "out")] if words[0] != "generate" else list(words)) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "s3cret" not in captured.err
        [line] = captured.err.splitlines()
        return line

    return run


@pytest.fixture(scope="module")
def nobody():
    """A URL of this machine at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}/v1"


def test_nobody_listens(refused, nobody):
    line = refused(1, "measure", *SHORT, "--llm-url", nobody, "--max-retries", "1", "--patience-s", "0")
    assert "connection" in line
    assert nobody in line


def test_a_url_is_none(refused):
    assert "must look like http://127.0.0.1:8000/v1; got 'gpu1:8000'" in refused(
        2, "measure", *SHORT, "--llm-url", "gpu1:8000"
    )
    assert "must not hold a key" in refused(2, "measure", *SHORT, "--llm-url", "http://me:pass@gpu1/v1")


def test_the_tokenizer_is_not_named(refused, nobody):
    options = ["--strategies", "s2t", "--threshold", "1", "--llm-url", nobody]
    assert "pass --llm MODEL (its tokenizer, beside --llm-url)" in refused(2, "eval", *SHORT, *options)


def test_a_support_is_unknown(refused):
    assert "support must be one of auto, slm-top, llm-top; got 'both'" in refused(
        2, "measure", *SHORT, "--support", "both"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("--timeout-s", "0"), ("--max-in-flight", "0"), ("--max-retries", "-1"), ("--prompt-price", "-1")],
)
def test_a_bound_is_none(refused, option, value):
    assert "must be" in refused(2, "measure", *SHORT, option, value)
