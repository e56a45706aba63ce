"""S2T-LOCAL with its SLM on a real vLLM server writes, token for token, what the engine in this process writes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from s2t.api import load
from s2t.tasks.problems import load_task

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

NUM_PROBLEMS, A_FEW = 100, 25
LORA = ("--enable-lora", "--max-loras", "2", "--lora-modules")
PLUGIN = ("--logits-processors", "s2t.integrations.vllm:SelectToThink")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    return [task.prompt(problem) for problem in task.problems("test", NUM_PROBLEMS, 0)]


@pytest.fixture(scope="module", params=["always", "always with the plug-in", "stream", "rank", "rank with the plug-in"])
def pair(request, merged, serve_vllm):
    """The same merged folder in this process and on a server."""
    kind = request.param.split()[0]
    folder = merged(kind)
    options = (*LORA, f"s2t={folder}/s2t_adapter") if kind in ("stream", "rank") else ()
    server = serve_vllm(folder, *options, *(PLUGIN if "plug-in" in request.param else ()))
    there = load(folder, slm_url=[server.url])
    assert there.pair.served_slm.has_plugin == ("plug-in" in request.param)
    yield load(folder), there, server
    server.kill()


@pytest.mark.parametrize("trigger", ["criticality", "random"])
def test_s2t_local_on_a_server_writes_the_same_tokens(pair, prompts, trigger):
    here, there, _ = pair
    asked = prompts if trigger == "criticality" else prompts[:A_FEW]
    settings = {"trigger": trigger, "threshold": 0.7 if trigger == "criticality" else 0.05, "max_new_tokens": 160}
    wanted = here.generate(asked, **settings)
    client = there.pair.served_slm.client
    client.take_counts()
    found = there.generate(asked, **settings)
    calls, tokens = client.take_counts().calls, sum(len(one.token_ids) for one in found)
    same = sum(one.token_ids == other.token_ids for one, other in zip(wanted, found, strict=True))
    fired, flips = (sum(getattr(one, name) for one in found) for name in ("num_triggered", "num_flips"))
    facts = {
        "trigger": trigger,
        "has_plugin": there.pair.served_slm.has_plugin,
        "same": same,
        "problems": len(asked),
        "tokens": tokens,
        "triggered": fired,
        "flips": flips,
    }
    print(json.dumps(facts | {"requests_per_token": calls / tokens}), flush=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert [one.text for one in found] == [one.text for one in wanted]
    for ours, theirs in zip(wanted, found, strict=True):
        assert [step.fired for step in theirs.steps] == [step.fired for step in ours.steps]
        if there.pair.served_slm.has_plugin:  # tells neither criticality nor scores
            continue
        for step, other in zip(ours.steps, theirs.steps, strict=True):
            assert other.value == pytest.approx(step.value, abs=1e-3)
            if step.fired and step.scores is not None:
                kept = len(other.scores)
                assert other.candidates.ids == step.candidates.ids[:kept]
                pairs = zip(other.scores, step.scores[:kept], strict=True)
                gaps = [there - own for there, own in pairs if there is not None]
                assert max(gaps) - min(gaps) < 0.02  # reserved ids share in a server's log-probabilities
    assert fired > len(asked) / 4 and (flips > 0 or trigger == "random")
    assert calls / tokens < 0.5


def test_other_requests_beside_those_of_the_plugin_are_left_alone(pair, prompts):
    here, there, _ = pair
    wanted = here.generate(prompts[:A_FEW], strategy="greedy", max_new_tokens=160)
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(there.generate, prompts[:A_FEW], threshold=0.3, max_new_tokens=160)
        found = pool.submit(there.generate, prompts[:A_FEW], strategy="greedy", max_new_tokens=160).result()
        selected = beside.result()
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert [one.token_ids for one in selected] == [
        one.token_ids for one in here.generate(prompts[:A_FEW], threshold=0.3, max_new_tokens=160)
    ]


def test_greedy_on_a_server_is_greedy_here_and_takes_a_request_a_sequence(pair, prompts):
    here, there, _ = pair
    wanted = here.generate(prompts[:A_FEW], strategy="greedy", max_new_tokens=160)
    client = there.pair.served_slm.client
    client.take_counts()
    found = there.generate(prompts[:A_FEW], strategy="greedy", max_new_tokens=160)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert client.take_counts().calls == A_FEW
