"""S2T-LOCAL with its SLM on a real vLLM server writes, token for token, what the engine in this process writes."""

from __future__ import annotations

import json

import pytest

from s2t.api import load
from s2t.tasks.problems import load_task

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

NUM_PROBLEMS = 100
LORA = ("--enable-lora", "--max-lora-rank", "16", "--lora-modules")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    return [task.prompt(problem) for problem in task.problems("test", NUM_PROBLEMS, 0)]


@pytest.fixture(scope="module", params=["always", "stream"])
def pair(request, merged, serve_vllm):
    """The same merged folder in this process and on a server."""
    folder = merged(request.param)
    options = (*LORA, f"s2t={folder}/s2t_adapter") if request.param == "stream" else ()
    server = serve_vllm(folder, *options)
    yield load(folder), load(folder, slm_url=[server.url]), server
    server.kill()


@pytest.mark.parametrize("trigger", ["criticality", "random"])
def test_s2t_local_on_a_server_writes_the_same_tokens(pair, prompts, trigger):
    here, there, _ = pair
    settings = {"trigger": trigger, "threshold": 0.7 if trigger == "criticality" else 0.05, "max_new_tokens": 160}
    wanted = here.generate(prompts, **settings)
    client = there.session.served_slm.client
    client.take_counts()
    found = there.generate(prompts, **settings)
    calls, tokens = client.take_counts().calls, sum(len(one.token_ids) for one in found)
    print(json.dumps({"trigger": trigger, "tokens": tokens, "requests_per_token": calls / tokens}))
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert [one.text for one in found] == [one.text for one in wanted]
    for ours, theirs in zip(wanted, found, strict=True):
        assert [step.fired for step in theirs.steps] == [step.fired for step in ours.steps]
        for step, other in zip(ours.steps, theirs.steps, strict=True):
            assert other.value == pytest.approx(step.value, abs=1e-3)
            if step.fired and step.scores is not None:
                kept = len(other.scores)
                assert other.candidates.ids == step.candidates.ids[:kept]
                assert other.scores == pytest.approx(step.scores[:kept], abs=0.02)
    assert sum(one.num_triggered for one in found) > NUM_PROBLEMS / 4 and sum(one.num_flips for one in found) > 0
    assert calls / tokens < 0.5


def test_greedy_on_a_server_is_greedy_here_and_takes_a_request_a_sequence(pair, prompts):
    here, there, _ = pair
    wanted = here.generate(prompts, strategy="greedy", max_new_tokens=160)
    client = there.session.served_slm.client
    client.take_counts()
    found = there.generate(prompts, strategy="greedy", max_new_tokens=160)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert client.take_counts().calls == NUM_PROBLEMS
