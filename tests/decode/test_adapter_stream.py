"""Scope `stream`: base for the tokens, the adapter's own reading of prefix and candidate for the scores, as late as can be."""

from __future__ import annotations

import pytest
import torch

from s2t.core.support import propose
from s2t.decode.loop import Decoder
from s2t.model.engine import Engine
from s2t.records import Request

HALF = {"trigger": "random", "threshold": 0.5}


def state_uncached(adapter, ids, acts):
    """The state of the last token in one forward over everything, under the adapter or not; [H]."""
    adapter.act(acts)
    with torch.inference_mode():
        output = adapter.base_model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
    adapter.act(False)
    return output.last_hidden_state[0, -1]


def test_the_loop_equals_uncached_forwards_of_base_and_adapter(adapters, write, strategy, prompts):
    adapter = adapters["stream"]
    engine = Engine(adapter.loaded, 1)
    done = write(strategy("s2t-local", **HALF), scope="stream")
    checked = flips = 0
    for prompt, sequence in zip(prompts, done, strict=True):
        prefix = list(prompt)
        for step in sequence.steps:
            ids, logprobs = propose(engine.logits(state_uncached(adapter, prefix, False)[None]), 4)
            assert step.greedy_id == ids[0, 0]
            if step.fired:
                states = torch.stack([state_uncached(adapter, [*prefix, c], True) for c in ids[0].tolist()])
                [scores] = adapter.scores(states[None], ids, logprobs)
                torch.testing.assert_close(torch.tensor(step.scores), scores, rtol=1e-3, atol=1e-3)
                assert step.token_id == ids[0, scores.argmax()]
                checked, flips = checked + 1, flips + step.flip
            prefix.append(step.token_id)
    assert checked > 20 and flips > 5


def test_rank_reads_the_prefix_in_the_adapters_own_stream(adapters, write, strategy, prompts):
    adapter = adapters["rank-stream"]
    engine = Engine(adapter.loaded, 1)
    done = write(strategy("s2t-local", **HALF), scope="rank-stream")
    checked = flips = 0
    for prompt, sequence in zip(prompts, done, strict=True):
        prefix = list(prompt)
        for step in sequence.steps:
            if step.fired:
                logits = engine.head(state_uncached(adapter, prefix, True))
                expected = logits[list(step.candidates.ids)].log_softmax(-1)
                torch.testing.assert_close(torch.tensor(step.scores), expected, rtol=1e-3, atol=1e-3)
                assert step.token_id == step.candidates.ids[expected.argmax()]
                checked, flips = checked + 1, flips + step.flip
            prefix.append(step.token_id)
    assert checked > 20 and flips > 5


def test_what_is_not_triggered_is_the_base_model_bit_for_bit(slm, adapters, prompts):
    adapter = adapters["stream"]
    base, beside = Engine(slm, 6), Engine(adapter.loaded, 6, adapter)
    own = Engine(adapter.loaded, 6, adapter, scope="always")
    rows = list(range(6))
    hidden = [engine.extend(rows, prompts) for engine in (base, beside)]
    assert not torch.allclose(own.extend(rows, prompts), hidden[0], atol=1e-2)
    for _ in range(3):
        logits = [engine.logits(state) for engine, state in zip((base, beside), hidden, strict=True)]
        assert torch.equal(*logits)
        step = logits[0].argmax(-1, keepdim=True).tolist()
        own.extend(rows, step)  # leaves the adapter switched on
        hidden = [engine.extend(rows, step) for engine in (base, beside)]


def test_the_adapter_reads_nothing_until_a_row_triggers(adapters, strategy, prompts):
    adapter = adapters["stream"]

    def run(how):
        decoder = Decoder(Engine(adapter.loaded, 4, adapter), how, None, 24)
        steps = list(decoder.run([Request(i, p, f"problem-{i}") for i, p in enumerate(prompts)]))
        return decoder, steps

    decoder, _ = run(strategy("s2t-local", trigger="never"))
    assert decoder.batch.stream is not None and all(work.forwards == 0 for work in decoder.batch.stream.engine.work)
    decoder, steps = run(strategy("s2t-local", **HALF))
    for index, prompt in enumerate(prompts):
        own = [step for step in steps if step.request == index]
        fired = [step.index for step in own if step.fired]
        last = own[-1]
        flips = sum(step.flip for step in own[:-1])
        read = len(prompt) + fired[-1] if fired else 0  # up to the last trigger, once
        base = len(prompt) + len(own) - 1 + flips + last.fired
        assert decoder.costs[index].slm_processed == base + read + 4 * len(fired)


@pytest.mark.parametrize("reading", ["head", "reserved"])
def test_criticality_is_read_from_the_base_model(reading, new_model, new_adapter, strategy, prompts):
    adapter = new_adapter(new_model(0), "stream", criticality=reading)
    requests = [Request(i, p) for i, p in enumerate(prompts)]
    steps = list(
        Decoder(Engine(adapter.loaded, 6, adapter), strategy("s2t-local", threshold=0.5), None, 24).run(requests)
    )
    by_request = [[step for step in steps if step.request == i] for i in range(len(prompts))]
    for prompt, own in zip(prompts, by_request, strict=True):
        ids = list(prompt)
        for step in own:
            value = adapter.criticality(state_uncached(adapter, ids, False))
            assert step.value == pytest.approx(float(value), abs=1e-4)
            ids.append(step.token_id)
    assert any(step.fired for step in steps) and any(not step.fired for step in steps[30:])
