"""A remote LLM writes, selects and labels as the same LLM in this process does, with the support that servers can give."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from s2t.config import DecodeConfig
from s2t.decode.pair import Pair
from s2t.decode.remote.client import RemoteSettings
from s2t.decode.remote.llm import RemoteLLM
from s2t.errors import ConfigError, ModelError
from s2t.methods.strategies import build_strategy
from s2t.model.outline import load_outline
from s2t.tasks.problems import load_task

NEW = 32
STRANGE = ["A shop sells 3 pens for 12 coins. How much is one pen?", "Read 30 pages, twice as many on Tuesday."]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Problems of the kind that the embedded pair was trained on."""
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    return [task.prompt(problem) for problem in task.problems("test", 3, 0)]


@pytest.fixture
def remote(serve, model_answers, tiny_llm):
    """Make a RemoteLLM on a server with some features; `faults` spoil a share of its replies."""
    opened = []

    def make(features=None, fault_rate=0.0, **answers):
        known = {} if features is None else {"features": frozenset(features)}
        server = serve(model_answers(tiny_llm, **known, **answers))
        settings = RemoteSettings((server.url,), backoff_s=0.01, max_backoff_s=0.05, timeout_s=30.0, max_retries=30)
        opened.append(RemoteLLM.open(load_outline("tiny:llm"), settings))
        server.bodies.clear()
        server.fault_rate, server.faults = fault_rate, ("429", "500", "garbage", "half", "reset", "wrong")
        return opened[-1], server

    yield make
    for llm in opened:
        llm.client.close()


@pytest.fixture
def run(prompts):
    def write(slm, llm, name="s2t", support="llm-top", prompts=prompts, **changes):
        pair = Pair(slm, llm)
        config = DecodeConfig(**{"threshold": 0.1, "support": support, "support_size": 20, **changes})
        requests = [pair.request(i, prompt) for i, prompt in enumerate(prompts)]
        return pair.write(build_strategy(name, config, {}), requests, NEW, keep_steps=True)

    return write


def tokens(done):
    return [sequence.token_ids for sequence in done]


@pytest.mark.parametrize("name", ["s2t", "takeover", "llm"])
def test_a_remote_llm_gives_the_tokens_of_the_same_llm_in_process(remote, tiny_slm, tiny_llm, name, run):
    llm, _ = remote()
    here, there = run(tiny_slm, tiny_llm, name), run(tiny_slm, llm, name)
    assert tokens(there) == tokens(here)
    assert [s.finish_reason for s in there] == [s.finish_reason for s in here]
    assert [s.num_triggered for s in there] == [s.num_triggered for s in here]
    if name != "llm":
        assert any(s.num_flips for s in there)
        values = [[step.value for step in s.steps] for s in (*here, *there)]
        np.testing.assert_allclose(list(chain(*values[: len(here)])), list(chain(*values[len(here) :])), atol=1e-4)


def test_drafts_of_any_length_give_the_same_tokens(remote, tiny_slm, run):
    llm, _ = remote()
    short, long = run(tiny_slm, llm, draft_tokens=3), run(tiny_slm, llm, draft_tokens=16)
    assert tokens(short) == tokens(long)
    assert sum(s.cost.llm_forwards for s in long) < sum(s.cost.llm_forwards for s in short)


def test_one_request_per_draft(remote, tiny_slm, run):
    llm, server = remote()
    done = run(tiny_slm, llm, draft_tokens=8, num_candidates=8)
    assert len(server.bodies) == sum(s.cost.llm_forwards for s in done)
    assert len(server.bodies) < sum(len(s.token_ids) for s in done) / 2
    assert all(body.get("prompt_logprobs") in (20, None) for body in server.bodies)


def test_faults_change_nothing(remote, tiny_slm, run):
    llm, server = remote(fault_rate=0.3)
    spoilt = run(tiny_slm, llm, draft_tokens=6)
    assert sum(server.spoilt.values()) > 3
    server.fault_rate = 0.0
    assert tokens(spoilt) == tokens(run(tiny_slm, llm))


def test_candidates_that_are_not_listed_are_asked_for_by_id(remote, tiny_slm, tiny_llm, run):
    llm, server = remote(max_logprobs=20)
    object.__setattr__(llm.abilities, "num_listed", 1)  # nearly no candidate is listed where the two models differ
    settings = {"support_size": 1, "threshold": 0.05, "num_candidates": 2, "prompts": STRANGE}
    here, there = run(tiny_slm, tiny_llm, **settings), run(tiny_slm, llm, **settings)
    assert tokens(there) == tokens(here)
    assert any("logprob_token_ids" in body for body in server.bodies)
    assert llm.num_unknown == 0
    unlisted = [step for s in there for step in s.steps if step.llm_probs and None in step.llm_probs]
    assert unlisted


@pytest.mark.parametrize("features", [{"ids"}, set()])
def test_a_server_with_plain_logprobs_is_asked_token_by_token(remote, tiny_slm, tiny_llm, features, run):
    llm, server = remote(features)
    assert not llm.abilities.prompt_logprobs
    assert not llm.abilities.logprob_token_ids
    assert llm.abilities.speaks_ids == bool(features)
    assert "one request per token" in llm.abilities.note()
    here, there = run(tiny_slm, tiny_llm), run(tiny_slm, llm)
    assert tokens(there) == tokens(here)
    assert all("prompt_logprobs" not in body for body in server.bodies)
    assert len(server.bodies) >= sum(len(s.token_ids) for s in there)


def test_a_server_that_cannot_rank_keeps_the_slms_first_and_counts_it(remote, tiny_slm, run):
    llm, _ = remote({"ids"})
    object.__setattr__(llm.abilities, "num_listed", 1)
    run(tiny_slm, llm, support_size=1, threshold=0.05, num_candidates=1, prompts=STRANGE)
    report = llm.take_report()
    assert report["num_unknown_selections"] > 0
    assert not report["is_exact"]
    assert llm.take_report()["num_unknown_selections"] == llm.take_report()["calls"] == 0


def test_hosted_servers_list_five(remote):
    llm, _ = remote(set(), max_logprobs=5)
    assert llm.num_listed == 5


def test_labels_are_those_of_the_llm_in_process(remote, tiny_slm, tiny_llm, run, prompts):
    llm, server = remote()
    here, there = Pair(tiny_slm, tiny_llm), Pair(tiny_slm, llm)
    requests = [here.request(i, prompt) for i, prompt in enumerate(prompts)]
    written = tokens(here.write(build_strategy("greedy", DecodeConfig(), {}), requests, NEW))
    exact = here.label(requests, written, 16, 20, support="llm-top")
    found = there.label(requests, written, 16, 64, exact_at=lambda _, own: range(len(own.rank)))
    assert sum("prompt_logprobs" in body for body in server.bodies) == len(prompts)
    for left, right in zip(exact, found, strict=True):
        np.testing.assert_allclose(right.divergence, left.divergence, atol=1e-4)
        np.testing.assert_array_equal(right.rank, left.rank)
        np.testing.assert_array_equal(right.candidate_ids, left.candidate_ids)
        np.testing.assert_allclose(right.llm_probs, left.llm_probs, atol=1e-5)
    rough = there.label(requests, written, 16, 64)
    for left, right in zip(exact, rough, strict=True):
        assert np.abs(right.llm_probs - left.llm_probs).max() < 1e-2


def test_the_slms_support_cannot_be_had_from_a_server(remote, tiny_slm, run):
    llm, _ = remote()
    with pytest.raises(ConfigError, match="support slm-top needs the LLM's whole distribution"):
        run(tiny_slm, llm, support="slm-top")
    with pytest.raises(ConfigError, match="divergence released-code needs the LLM's whole distribution"):
        run(tiny_slm, llm, divergence="released-code")


def test_other_tokens_are_refused_beside_the_slm_and_fine_alone(remote, tiny_llm, run):
    from s2t.model.load import load_model

    other = load_model("tiny:slm-numbers")
    llm, _ = remote()
    with pytest.raises(ModelError, match=r"tokenizer of tiny:llm is not that of tiny:slm-numbers.*by token"):
        run(other, llm)
    assert tokens(run(other, llm, "llm")) == tokens(run(other, tiny_llm, "llm"))


def test_an_outline_knows_the_model_without_its_weights(tiny_llm):
    outline = load_outline("tiny:llm")
    assert (outline.num_params, outline.vocab_size) == (tiny_llm.num_params, tiny_llm.vocab_size)
    assert outline.stop_ids == tiny_llm.stop_ids
    assert set(outline.reserved_ids) == {i for i in tiny_llm.reserved.all if i < tiny_llm.vocab_size}


METHODS = {
    "specreason": {"threshold": 5.0},
    "smart": {"threshold": 0.999},
    "glimprouter": {"threshold": 1e-5},
    "contrastive": {"threshold": 0.1},
    "speculative": {"threshold": 0.0, "top_k": 1},
    "takeover": {"span_tokens": 4},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_beside_ours_write_the_same_with_an_llm_on_servers(remote, tiny_slm, tiny_llm, run, name):
    llm, server = remote()
    found, wanted = (run(tiny_slm, one, name, **METHODS[name]) for one in (llm, tiny_llm))
    assert tokens(found) == tokens(wanted)
    assert [s.num_triggered for s in found] == [s.num_triggered for s in wanted]
    assert server.bodies


def test_a_method_that_a_server_cannot_serve_is_refused_by_name(remote, tiny_slm, run):
    with pytest.raises(ConfigError, match="strategy speculative needs the LLM's whole distribution"):
        run(tiny_slm, remote()[0], "speculative", threshold=0.0)
