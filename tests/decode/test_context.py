"""What models cannot read is refused, and an answer ends where their context does, in every command as in the server."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import s2t
from s2t.cli.main import main
from s2t.config import ServeConfig
from s2t.decode.pair import Pair
from s2t.errors import ConfigError, ContextError
from s2t.records import Request

CONTEXT = 256  # of the models of these tests


def requests(*lengths):
    return [Request(i, [5 + i] * length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("name", ["greedy", "sample", "llm", "s2t"])
def test_an_answer_ends_where_the_context_does(name, strategy, slm, llm):
    pair = Pair(slm, llm)
    settings = {"threshold": 1.0} if name == "s2t" else {}
    long = pair.write(strategy(name, **settings), requests(250, 3, 254), 10_000)
    assert [len(sequence.token_ids) for sequence in long if sequence.finish_reason == "length"]
    for sequence, length in zip(long, (250, 3, 254), strict=True):
        assert len(sequence.token_ids) <= CONTEXT - length
        if sequence.finish_reason == "length":
            assert len(sequence.token_ids) == CONTEXT - length
    alone = pair.write(strategy(name, **settings), requests(250), 4)
    assert alone[0].token_ids == long[0].token_ids[: len(alone[0].token_ids)]


def test_the_shorter_context_of_a_pair_counts(slm, random_model):
    other = random_model(max_position_embeddings=200)
    unlimited = SimpleNamespace(context_length=None)
    lengths = [Pair(slm, llm).context_length for llm in (None, other, unlimited)]
    assert lengths == [CONTEXT, 200, CONTEXT] and Pair(unlimited).context_length is None


def test_a_prompt_without_room_for_a_token_is_refused(strategy, slm):
    pair = Pair(slm)
    assert pair.write(strategy("greedy"), requests(255), 8)[0].token_ids
    for length in (256, 257, 10_000):
        with pytest.raises(ContextError, match=f"has {length} tokens, and the models read up to 256"):
            pair.write(strategy("greedy"), requests(3, length), 8)
        with pytest.raises(ContextError):
            next(iter(pair.steps(strategy("greedy"), requests(length), 8)))


def test_the_server_has_the_same_limit(slm, llm):
    intake = pytest.importorskip("s2t.serve.intake")
    for pair in (Pair(slm), Pair(slm, llm)):
        assert intake.longest(ServeConfig(), pair) == pair.context_length == CONTEXT


@pytest.fixture(scope="module")
def question():
    return "How many? " + "12 + 13 " * 2**17  # a megabyte


def test_a_question_of_a_megabyte_is_refused_at_once(question):
    reasoner = s2t.load("tiny:slm")
    for ask in (reasoner.generate, reasoner.stream):
        with pytest.raises(ContextError, match="1024"):
            ask(question)


COMMANDS = {
    "generate": ["generate"],
    "eval": ["eval", "--strategies", "greedy"],
    "eval of the LLM": ["eval", "--strategies", "llm", "--llm", "tiny:llm"],
    "measure": ["measure"],
    "collect": ["collect", "--threshold", "1"],
    "distill": ["distill"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_in_one_line(command, question, tmp_path, capsys):
    words = COMMANDS[command]
    if words[0] != "generate":
        rows = [{"question": f"{n}: {question}", "answer": "1"} for n in range(8)]
        (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [*words, "--task", str(tmp_path / "problems.jsonl"), "--out", str(tmp_path / "out"), "--limit", "1"]
        words += [] if words[0] == "distill" else ["--split", "train"]
        assert main(words) == 2
        assert "problem " in capsys.readouterr().err
        return
    assert main([*words, question]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and "read up to 1024" in captured.err and not captured.out


def test_a_limit_past_the_context_is_cut_in_every_command(tmp_path, capsys):
    question = "12 + 13 " * 140
    assert main(["generate", question, "--max-new-tokens", "100000", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["slm_processed"] <= 1024
    rows = [{"question": f"{n}: {question}", "answer": "1"} for n in range(8)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--task",
        str(tmp_path / "problems.jsonl"),
        "--limit",
        "1",
        "--max-new-tokens",
        "100000",
        "--split",
        "train",
    ]
    for command in (["eval", "--strategies", "greedy"], ["measure"], ["collect", "--threshold", "1"]):
        assert main([*command, *words, "--out", str(tmp_path / command[0])]) == 0


def test_what_are_no_messages_is_one_line_before_anything_is_made_of_them(slm):
    with pytest.raises(ConfigError, match="a message must be"):
        Pair(slm).request(0, [{"role": "user", "content": b"1 + 1 ="}])
