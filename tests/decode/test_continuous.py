"""The loop fed while it runs: what a request gets does not depend on what runs beside it, and cancelled rows are free."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from s2t.decode.continuous import OwnRequest
from s2t.decode.pair import Pair
from s2t.methods.sample import Sampling
from s2t.records import Request

LENGTH = 24


def drain(decoder, found):
    """Run a decoder until it is idle; steps by request."""
    while decoder.is_busy:
        for step in decoder.round():
            found.setdefault(step.request, []).append(step)
    return found


def session_of(name, slm, llm, adapters, rows):
    adapter = adapters["candidates"] if name == "s2t-local" else None
    return Pair(adapter.loaded if adapter else slm, llm, adapter, batch_size=rows)


def settings_of(name):
    return {"threshold": 0.5} if name in ("s2t", "takeover", "s2t-local") else {}


@pytest.mark.parametrize("settings", [{"span_tokens": 3}, {"trigger": "step-entropy", "step_end": "w7"}], ids=str)
def test_spans_and_triggers_of_the_text_write_what_they_write_alone(settings, slm, llm, prompts, strategy):
    how = strategy("takeover", threshold=0.5, **settings)
    pair = Pair(slm, llm, batch_size=2)
    decoder = pair.continuous(how, 64)
    for i, prompt in enumerate(prompts):
        decoder.add(OwnRequest(i, prompt, f"p{i}", max_new_tokens=LENGTH))
    found = drain(decoder, {})
    alone = pair.write(how, [Request(i, prompt, f"p{i}") for i, prompt in enumerate(prompts)], LENGTH)
    assert {i: [step.token_id for step in steps] for i, steps in found.items()} == {
        i: one.token_ids for i, one in enumerate(alone)
    }
    assert any(one.num_triggered for one in alone)


@pytest.mark.parametrize("name", ["greedy", "sample", "s2t-local", "s2t", "takeover"])
def test_a_request_gets_what_it_gets_alone_whoever_comes_and_goes(name, slm, llm, adapters, prompts, strategy):
    pair = session_of(name, slm, llm, adapters, rows=3)
    how = Sampling(1.3, 0.9) if name == "sample" else None
    one = strategy(name, **settings_of(name))
    rng = random.Random(0)
    asked = [
        OwnRequest(
            i,
            prompts[i % len(prompts)],
            f"p{i}",
            max_new_tokens=rng.randint(1, LENGTH),
            seed=i % 4,
            sampling=how and replace(how, temperature=1 + i % 3 / 4),
        )
        for i in range(17)
    ]
    decoder, found, gone = pair.continuous(one, 64), {}, set()
    for request in asked:
        decoder.add(request)
        for step in decoder.round():
            found.setdefault(step.request, []).append(step)
        if request.index % 5 == 4:
            gone.add(request.index - 1)
            decoder.cancel(request.index - 1)
            assert request.index - 1 not in {row.request.index for row in decoder.batch.rows}
    drain(decoder, found)
    assert not decoder.batch.rows
    assert not decoder.costs.keys() & gone
    for request in asked:
        if request.index in gone:
            continue
        own = replace(one, seed=request.seed, sampling=request.sampling)
        alone = pair.write(own, [Request(0, request.prompt_ids, request.key)], request.max_new_tokens)[0]
        assert [step.token_id for step in found[request.index]] == alone.token_ids
        assert found[request.index][-1].finish_reason == alone.finish_reason


def test_greedy_and_samples_of_different_settings_share_a_decoder(slm, prompts, strategy):
    pair = Pair(slm, batch_size=8)
    settings = [None, Sampling(0.5, 1.0), Sampling(2.0, 0.8), Sampling(2.0, 0.8, top_k=3), None]
    decoder = pair.continuous(strategy("greedy"), 64)
    for i, how in enumerate(settings):
        decoder.add(OwnRequest(i, prompts[0], "key", max_new_tokens=LENGTH, sampling=how, seed=7))
    found = drain(decoder, {})
    for i, how in enumerate(settings):
        own = replace(strategy("sample", seed=7), sampling=how)
        alone = pair.write(own, [Request(0, prompts[0], "key")], LENGTH)[0]
        assert [step.token_id for step in found[i]] == alone.token_ids


def test_readings_are_the_models_own_distribution(slm, adapters, prompts, strategy):
    adapter = adapters["candidates"]
    pair = Pair(adapter.loaded, adapter=adapter, batch_size=4)
    one = strategy("s2t-local", threshold=0.5)
    decoder = pair.continuous(one, 64)
    decoder.add(OwnRequest(0, prompts[0], max_new_tokens=LENGTH, num_likeliest=6))
    decoder.add(OwnRequest(1, prompts[1], max_new_tokens=LENGTH))
    steps = drain(decoder, {})[0]
    assert {index for index, _ in decoder.readings} == {0}
    traced = pair.write(one, [Request(0, prompts[0])], LENGTH, keep_steps=True)[0].steps
    for step, reference in zip(steps, traced, strict=True):
        reading = decoder.readings[0, step.index]
        assert reference.candidates is not None
        count = len(reference.candidates.ids)
        assert reading.likeliest.ids[:count] == reference.candidates.ids
        assert reading.likeliest.logprobs[:count] == pytest.approx(reference.candidates.logprobs, abs=1e-5)
        assert reading.logprob == pytest.approx(dict(zip(*_columns(reading.likeliest), strict=True))[step.token_id])
        assert reading.criticality == pytest.approx(step.value, abs=1e-6)


def test_the_logprob_of_an_unlikely_sample_is_known(slm, prompts, strategy):
    decoder = Pair(slm, batch_size=4).continuous(strategy("greedy"), 64)
    hot = Sampling(5.0, 1.0)
    decoder.add(OwnRequest(0, prompts[0], "key", max_new_tokens=LENGTH, sampling=hot, num_likeliest=1))
    decoder.add(OwnRequest(1, prompts[0], "key", max_new_tokens=LENGTH, sampling=hot, num_likeliest=40))
    found = drain(decoder, {})
    assert [s.token_id for s in found[0]] == [s.token_id for s in found[1]]
    for step in found[0]:
        narrow, wide = (decoder.readings[i, step.index] for i in (0, 1))
        assert narrow.logprob == pytest.approx(wide.logprob, abs=1e-5)
        assert len(narrow.likeliest.ids) == 1


def test_cancelling_what_waits_what_runs_and_what_is_unknown(slm, prompts, strategy):
    decoder = Pair(slm, batch_size=1).continuous(strategy("greedy"), 64)
    for i in range(3):
        decoder.add(OwnRequest(i, prompts[0], max_new_tokens=LENGTH))
    decoder.round()
    decoder.round()
    decoder.cancel(0)
    decoder.cancel(1)
    decoder.cancel(99)
    assert not decoder.batch.rows
    assert set(drain(decoder, {})) == {2}
    assert not decoder.is_busy


def _columns(candidates):
    return candidates.ids, candidates.logprobs


def test_steps_of_fixed_shapes_give_the_same(slm, prompts, strategy):
    found = []
    for execution in ("eager", "static"):
        pair = Pair(replace(slm, execution=execution), batch_size=3)
        decoder, steps = pair.continuous(strategy("greedy"), 64), {}
        for i in range(7):
            decoder.add(OwnRequest(i, prompts[i % len(prompts)], f"p{i}", max_new_tokens=4 + 3 * i))
            decoder.round()
            if i == 4:
                decoder.cancel(3)
        drain(decoder, steps)
        found.append({index: [step.token_id for step in own] for index, own in steps.items()})
    assert found[0] == found[1]
