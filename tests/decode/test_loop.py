"""Laws of the decoding loop: what is the same whatever the batch, what never fires, never flips and is never emitted."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from s2t.config import METHODS
from s2t.decode.loop import Decoder, DraftLength
from s2t.decode.pair import Pair
from s2t.errors import ConfigError
from s2t.model.engine import Engine
from s2t.records import Request

EVERY_STEP = {"trigger": "entropy", "threshold": -1.0}
HALF = {"trigger": "random", "threshold": 0.5}
RUNS = {
    "greedy": ("greedy", {}),
    "sample": ("sample", {"temperature": 1.5, "top_p": 0.95}),
    "llm": ("llm", {}),
    "takeover": ("takeover", {"threshold": 1.0}),
    "takeover-random": ("takeover", HALF),
    "s2t": ("s2t", {"threshold": 1.0}),
    "s2t-entropy": ("s2t", {"trigger": "entropy", "threshold": 0.5}),
    "s2t-local": ("s2t-local", {"threshold": 0.5}),
    "s2t-local-random": ("s2t-local", HALF),
}
every_run = pytest.mark.parametrize("run", RUNS)
SCOPES = ("step", "rank-stream", "always", "stream")
LOCAL = [run for run, (name, _) in RUNS.items() if "adapter" in METHODS[name].needs]
DRAFTED = [run for run, (name, _) in RUNS.items() if METHODS[name].selector and run not in LOCAL]
OTHER_SCOPES = [(run, scope) for scope in SCOPES for run in LOCAL]
every_scope = pytest.mark.parametrize("scope", ["candidates", *SCOPES])


def fired(sequence):
    return [step.index for step in sequence.steps if step.fired]


def facts(done):
    return [(s.token_ids, fired(s), s.finish_reason, s.num_flips) for s in done]


# The same whatever the batch


def test_greedy_is_the_greedy_generate_of_transformers(write, strategy, tokens, slm, prompts):
    done = write(strategy("greedy"), batch_size=4)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = slm.model.get_output_embeddings().weight.shape[0]
    reference = slm.model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=24,
        suppress_tokens=[*slm.reserved.all, *range(slm.vocab_size, rows)],
    )
    for sequence, row in zip(done, reference[:, width:].tolist(), strict=True):
        assert sequence.token_ids == row[: len(sequence.token_ids)]
        assert sequence.finish_reason == ("stop" if row[len(sequence.token_ids) - 1] == 1 else "length")
    assert len({len(row) for row in tokens(done)}) > 1, "the prompts should end at different lengths"


@pytest.mark.parametrize(("run", "scope"), [*((run, "candidates") for run in RUNS), *OTHER_SCOPES])
def test_a_batch_writes_what_single_sequences_write_and_costs_the_same(run, scope, write, strategy):
    name, settings = RUNS[run]
    how = strategy(name, **settings)
    alone = write(how, batch_size=1, scope=scope)
    together = write(how, batch_size=8, scope=scope)
    assert facts(together) == facts(alone)
    assert [s.cost for s in together] == [s.cost for s in alone]
    if how.selector is not None:
        assert any(map(fired, alone)), "nothing fired, so nothing was compared"


@every_run
def test_rows_admitted_late_write_what_they_write_all_at_once(run, write, strategy):
    name, settings = RUNS[run]
    how = strategy(name, **settings)
    at_once = facts(write(how, batch_size=8))
    assert facts(write(how, batch_size=2)) == at_once
    assert facts(write(how, batch_size=3)) == at_once


def test_samples_depend_on_seed_and_key_alone(write, strategy, tokens, prompts):
    settings = RUNS["sample"][1]
    first = tokens(write(strategy("sample", **settings)))
    assert tokens(write(strategy("sample", **settings))) == first
    assert tokens(write(strategy("sample", seed=1, **settings))) != first


def test_samples_of_one_prompt_share_its_prefill_and_differ(slm, strategy, prompts):
    how = strategy("sample", **RUNS["sample"][1])
    requests = [Request(i, prompts[0], f"p/{i}") for i in range(4)]
    together = Pair(slm, batch_size=4).write(how, requests, 24)
    alone = Pair(slm, batch_size=1).write(how, requests, 24)
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]
    assert len({tuple(s.token_ids) for s in together}) == 4
    prompt_tokens = sum(s.cost.slm_processed - (s.cost.generated - 1) for s in together)
    assert prompt_tokens == len(prompts[0])


@every_run
def test_a_trace_changes_nothing(run, slm, llm, adapters, strategy, prompts):
    name, settings = RUNS[run]
    adapter = adapters["candidates"] if name == "s2t-local" else None
    pair = Pair(adapter.loaded if adapter else slm, llm, adapter, batch_size=8)
    requests = [Request(i, prompt, f"problem-{i}") for i, prompt in enumerate(prompts)]
    plain = pair.write(strategy(name, **settings), requests, 24)
    traced = pair.write(strategy(name, **settings), requests, 24, keep_steps=True)
    assert [(s.token_ids, s.cost, s.num_triggered) for s in plain] == [
        (s.token_ids, s.cost, s.num_triggered) for s in traced
    ]
    assert all(step.candidates is not None for sequence in traced for step in sequence.steps)


def test_steps_come_in_order_and_end_once(write, strategy):
    for sequence in write(strategy("s2t", threshold=1.0), batch_size=3, max_new_tokens=7):
        assert [step.index for step in sequence.steps] == list(range(len(sequence.token_ids)))
        assert [step.finish_reason for step in sequence.steps[:-1]] == [None] * (len(sequence.steps) - 1)
        is_stop = sequence.token_ids[-1] == 1
        assert sequence.finish_reason == ("stop" if is_stop else "length")
        assert is_stop or len(sequence.token_ids) == 7


# When nothing fires, and when firing changes nothing


@pytest.mark.parametrize(
    ("name", "scope"), [("s2t", "candidates"), *(("s2t-local", scope) for scope in ("candidates", *SCOPES))]
)
@pytest.mark.parametrize("trigger", [EVERY_STEP, HALF], ids=["every step", "half"])
def test_one_candidate_is_greedy(name, scope, trigger, write, strategy, tokens):
    own = scope == "always"  # the adapted model is another model, with a greedy of its own
    greedy = write(strategy("s2t-local", trigger="never"), scope=scope) if own else write(strategy("greedy"))
    found = write(strategy(name, num_candidates=1, **trigger), scope=scope)
    assert tokens(found) == tokens(greedy)
    assert any(map(fired, found))


@pytest.mark.parametrize("name", ["takeover", "s2t", "s2t-local"])
def test_trigger_never_is_greedy(name, write, strategy, tokens):
    assert tokens(write(strategy(name, trigger="never"))) == tokens(write(strategy("greedy")))


@pytest.mark.parametrize("name", ["takeover", "s2t"])
@pytest.mark.parametrize("how", [{"threshold": 1e-4}, EVERY_STEP], ids=["divergence", "every step"])
def test_a_model_paired_with_itself_never_triggers_and_never_flips(name, how, write, strategy, tokens, slm, new_model):
    found = write(strategy(name, **how), llm=new_model(0))
    assert tokens(found) == tokens(write(strategy("greedy")))
    assert sum(s.num_flips for s in found) == 0
    if "trigger" not in how:
        assert sum(s.num_triggered for s in found) == 0
        assert all(0 <= step.value <= 1e-4 for s in found for step in s.steps)


def test_s2t_over_the_whole_vocabulary_is_takeover(write, strategy, tokens, slm):
    how = {"threshold": 1.0, "num_candidates": slm.vocab_size}
    assert tokens(write(strategy("s2t", **how))) == tokens(write(strategy("takeover", threshold=1.0)))


def test_takeover_takes_the_whole_vocabulary_whatever_k(write, strategy, tokens):
    takeover = [tokens(write(strategy("takeover", num_candidates=k, **EVERY_STEP))) for k in (1, 8)]
    assert takeover[0] == takeover[1]
    assert takeover[0] != tokens(write(strategy("greedy")))


def test_firing_at_every_step_takeover_writes_what_the_llm_writes_after_warmup_0(write, strategy, tokens):
    taken = write(strategy("takeover", warmup_steps=0, **EVERY_STEP))
    assert tokens(taken) == tokens(write(strategy("llm")))


@pytest.mark.parametrize("name", ["takeover", "s2t", "s2t-local"])
def test_warmup_steps_never_trigger(name, write, strategy):
    for sequence in write(strategy(name, **EVERY_STEP)):
        assert fired(sequence) == list(range(3, len(sequence.token_ids)))


@every_scope
def test_a_selector_that_learned_nothing_ranks_as_the_slm_does(scope, new_model, new_adapter, strategy, prompts):
    adapter = new_adapter(new_model(0), scope)
    learned = {
        name: p for name, p in adapter.trainable().items() if "bins" in name or (adapter.ranks and "lora_B" in name)
    }
    assert learned
    for parameter in learned.values():
        torch.nn.init.zeros_(parameter)
    pair = Pair(adapter.loaded, adapter=adapter, batch_size=8)
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
    greedy = pair.write(strategy("s2t-local", trigger="never"), requests, 24)
    found = pair.write(strategy("s2t-local", **EVERY_STEP), requests, 24)
    assert [s.token_ids for s in found] == [s.token_ids for s in greedy]
    assert sum(s.num_triggered for s in found) > 0


@every_scope
def test_an_adapter_that_selects_does_flip(scope, write, strategy):
    assert sum(s.num_flips for s in write(strategy("s2t-local", **EVERY_STEP), scope=scope)) > 0


@every_scope
def test_an_adapter_of_weight_0_is_greedy(scope, new_model, new_adapter, strategy, prompts):
    adapter = new_adapter(new_model(0), scope, adapter_weight=0.0)
    pair = Pair(adapter.loaded, adapter=adapter, batch_size=8)
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
    greedy = pair.write(strategy("s2t-local", trigger="never"), requests, 24)
    found = pair.write(strategy("s2t-local", **EVERY_STEP), requests, 24)
    assert [s.token_ids for s in found] == [s.token_ids for s in greedy]


def state_of_the_last_token(adapter, ids):
    """Its state when the LoRA acts on it alone, behind a cache of the base model; [H]."""
    decoder, cache = adapter.base_model.get_decoder(), DynamicCache()
    with torch.inference_mode():
        adapter.act(False)
        if ids[:-1]:
            decoder(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True)
        adapter.act(True)
        output = decoder(input_ids=torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True)
        adapter.act(False)
    return output.last_hidden_state[0, -1]


def test_rank_reads_the_prefixs_last_token_once_more_under_the_lora_alone(adapters, write, strategy, prompts):
    adapter = adapters["step"]
    engine = Engine(adapter.loaded, 1)
    checked = flips = 0
    for prompt, sequence in zip(prompts, write(strategy("s2t-local", **HALF), scope="step"), strict=True):
        prefix = list(prompt)
        for step in sequence.steps:
            if step.fired:
                logits = engine.head(state_of_the_last_token(adapter, prefix))  # [V]
                expected = logits[list(step.candidates.ids)].log_softmax(-1)
                torch.testing.assert_close(torch.tensor(step.scores), expected, rtol=1e-3, atol=1e-3)
                assert step.token_id == step.candidates.ids[expected.argmax()]
                checked, flips = checked + 1, flips + step.flip
            prefix.append(step.token_id)
    assert checked > 20 and flips > 5


def test_rank_costs_one_token_a_trigger_and_one_forward_a_flip(write, strategy, prompts):
    done = write(strategy("s2t-local", **HALF), scope="step")
    for sequence, prompt in zip(done, prompts, strict=True):
        cost, last = sequence.cost, sequence.steps[-1]
        flips = sum(step.flip for step in sequence.steps[:-1])
        assert cost.slm_forwards == cost.generated + flips + last.fired
        assert cost.slm_processed == len(prompt) + cost.generated - 1 + flips + last.fired + sequence.num_triggered
    assert sum(s.num_flips for s in done) > 0


def test_scope_candidates_leaves_the_base_model_bit_for_bit(slm, adapters, prompts):
    adapter = adapters["candidates"]
    base, adapted = Engine(slm, 6), Engine(adapter.loaded, 6, adapter)
    rows = list(range(6))
    hidden = [engine.extend(rows, prompts) for engine in (base, adapted)]
    for _ in range(4):
        assert torch.equal(*hidden)
        logits = [engine.logits(state) for engine, state in zip((base, adapted), hidden, strict=True)]
        assert torch.equal(*logits)
        branch = adapted.branch(rows, logits[0].topk(4).indices)
        assert branch.shape == (6, 4, 32)
        step = logits[0].argmax(-1, keepdim=True).tolist()
        hidden = [engine.extend(rows, step) for engine in (base, adapted)]
    plain = base.branch(rows, logits[0].topk(4).indices)
    assert not torch.allclose(adapted.branch(rows, logits[0].topk(4).indices), plain, atol=1e-2)


# Reserved ids


@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
@every_scope
@pytest.mark.parametrize("num_candidates", [8, "all"])
def test_reserved_ids_and_padding_rows_are_never_emitted(
    prior_weight, scope, num_candidates, new_model, new_adapter, strategy, prompts
):
    loaded, llm = new_model(0), new_model(1, num_rows=70)
    for model in (loaded, llm):
        rows = model.model.get_output_embeddings().weight
        huge = torch.randn(rows.shape[1]) * 100
        with torch.no_grad():
            for place, row in enumerate([*model.reserved.all, *range(model.vocab_size, len(rows))]):
                rows[row] = huge if place % 2 else -huge  # one of the two is far above every other logit
    adapter = new_adapter(loaded, scope, prior_weight=prior_weight)
    pair = Pair(loaded, llm, adapter, batch_size=8)
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
    k = loaded.vocab_size if num_candidates == "all" else 8
    forbidden = set(loaded.reserved.all) | set(range(loaded.vocab_size, 80))
    for name, settings in RUNS.values():
        done = pair.write(strategy(name, **{**settings, "num_candidates": k}), requests, 12)
        assert not forbidden & {token for s in done for token in s.token_ids}, name


# Costs


def test_greedy_costs_one_forward_a_token(write, strategy, prompts):
    for sequence, prompt in zip(write(strategy("greedy")), prompts, strict=True):
        cost = sequence.cost
        assert cost.generated == cost.slm_forwards == len(sequence.token_ids)
        assert cost.slm_processed == len(prompt) + cost.generated - 1
        assert (cost.llm_forwards, cost.llm_processed, cost.llm_flops) == (0, 0, 0)


def test_s2t_local_of_scope_candidates_costs_one_more_forward_a_flip(write, strategy, prompts):
    done = write(strategy("s2t-local", **HALF))
    for sequence, prompt in zip(done, prompts, strict=True):
        cost, last = sequence.cost, sequence.steps[-1]
        flips = sum(step.flip for step in sequence.steps[:-1])
        assert cost.slm_forwards == cost.generated + flips + last.fired  # a greedy sequence never runs its last token
        assert cost.slm_processed == len(prompt) + cost.generated - 1 + flips + last.fired + 4 * sequence.num_triggered
        assert (cost.llm_forwards, cost.llm_processed, cost.llm_flops) == (0, 0, 0)
    assert sum(s.num_flips for s in done) > 0


def test_s2t_local_of_scope_always_costs_no_forward_more_than_greedy(write, strategy):
    done = write(strategy("s2t-local", **HALF), scope="always")
    for sequence in done:
        last_needs_no_step = sequence.steps[-1].fired  # a greedy sequence never runs its last token
        assert sequence.cost.slm_forwards == sequence.cost.generated + last_needs_no_step
    assert sum(s.num_triggered for s in done) > 0


def test_the_llm_alone_costs_the_slm_nothing(write, strategy):
    for sequence in write(strategy("llm")):
        cost = sequence.cost
        assert (cost.slm_forwards, cost.slm_processed, cost.slm_flops) == (0, 0, 0)
        assert cost.llm_forwards == len(sequence.token_ids)


@pytest.mark.parametrize("name", ["s2t", "takeover"])
def test_step_by_step_a_trigger_that_reads_no_llm_reads_it_at_triggered_steps_only(name, write, strategy, prompts):
    done = write(strategy(name, draft_tokens=1, **HALF))
    for sequence, prompt in zip(done, prompts, strict=True):
        cost = sequence.cost
        assert cost.slm_forwards == cost.generated
        assert cost.llm_forwards == sequence.num_triggered
        if sequence.num_triggered:
            assert cost.llm_processed == len(prompt) + fired(sequence)[-1]


def test_step_by_step_a_divergence_trigger_reads_the_llm_at_every_token(write, strategy):
    for sequence in write(strategy("s2t", threshold=1.0, draft_tokens=1)):
        assert sequence.cost.llm_forwards == sequence.cost.slm_forwards == len(sequence.token_ids)


# Drafts


@pytest.mark.parametrize("run", DRAFTED)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_drafted_run_writes_what_step_by_step_writes_whatever_the_draft(run, batch_size, write, strategy):
    name, settings = RUNS[run]
    plain = write(strategy(name, draft_tokens=1, **settings))
    for length in (0, 2, 3, 7, 64):
        drafted = write(strategy(name, draft_tokens=length, **settings), batch_size=batch_size)
        assert facts(drafted) == facts(plain)
        for left, right in zip(drafted, plain, strict=True):
            for one, other in zip(left.steps, right.steps, strict=True):
                assert (one.greedy_id, one.selected_index) == (other.greedy_id, other.selected_index)
                assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-5)


def test_a_draft_that_is_never_flipped_costs_one_llm_forward(write, strategy):
    done = write(strategy("s2t", threshold=1e9, draft_tokens=6))
    assert sum(s.num_flips for s in done) == 0
    for sequence in done:
        length = sequence.cost.generated
        assert sequence.cost.llm_forwards == -(-length // 6)
        assert sequence.cost.slm_forwards == length


def test_drafts_grow_where_little_is_flipped_and_where_the_llm_is_large():
    length = DraftLength(cost_ratio=10).at
    assert length(0, 0) < length(500, 0)
    assert length(500, 50) < length(500, 5) < length(500, 0)
    assert DraftLength(cost_ratio=1).at(200, 2) < length(200, 2)
    assert DraftLength(cost_ratio=1e6, ceiling=20).at(10**6, 0) == 20
    assert DraftLength(fixed=5).at(100, 100) == 5


# Many rows in one forward


@every_scope
def test_a_row_that_selects_holds_up_no_other_row(scope, adapters, strategy, prompts):
    adapter = adapters[scope]
    forwards = []

    def run(how):
        engine = Engine(adapter.loaded, 6, adapter)
        original, calls = engine.step, [0]

        def counted(*args):
            calls[0] += 1
            return original(*args)

        engine.step = counted
        for _ in Decoder(engine, how, None, 24).run([Request(i, p, f"problem-{i}") for i, p in enumerate(prompts)]):
            pass
        forwards.append(calls[0])

    run(strategy("s2t-local", trigger="never"))
    run(strategy("s2t-local", trigger="random", threshold=0.1))
    assert forwards[1] <= forwards[0] + 24 // 4  # the slowest row's own flips, and no forward for each trigger


# Looked at from outside


@every_scope
def test_adjusted_rows_step_together_and_write_the_same(scope, adapters, strategy, prompts):
    adapter = adapters[scope]
    requests = [Request(i, prompt, f"problem-{i}") for i, prompt in enumerate(prompts)]
    how = strategy("s2t-local", **HALF)

    def run(adjust=None):
        engine = Engine(adapter.loaded, len(prompts), adapter)
        return list(Decoder(engine, how, None, 24, adjust=adjust).run(requests))

    seen = []

    def adjust(rows, logits):
        seen.append(list(rows))
        return logits

    free, together = run(), run(adjust)
    by_request = [
        [[s.token_id for s in steps if s.request == i] for i in range(len(prompts))] for steps in (free, together)
    ]
    assert by_request[0] == by_request[1]
    assert any(step.flip for step in together)
    lengths = [len(tokens) for tokens in by_request[1]]
    assert len(seen) == max(lengths)
    assert [sorted(rows) for rows in seen] == [[i for i, n in enumerate(lengths) if n > t] for t in range(len(seen))]
    assert [step.index for step in together] == sorted(step.index for step in together)


def test_a_stopped_request_ends_and_the_others_go_on(slm, strategy, prompts):
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
    whole = list(Decoder(Engine(slm, len(prompts)), strategy("greedy"), None, 24).run(requests))
    decoder = Decoder(Engine(slm, len(prompts)), strategy("greedy"), None, 24)
    steps = []
    for step in decoder.run(requests):
        steps.append(step)
        if (step.request, step.index) in ((1, 2), (3, 4)):
            decoder.stop(step.request)
    ends = {1: 3, 3: 5}
    wanted = [s for s in whole if s.index < ends.get(s.request, 99)]
    assert sorted(steps, key=lambda s: (s.request, s.index)) == sorted(wanted, key=lambda s: (s.request, s.index))
    assert decoder.costs[1].generated == 3 and decoder.costs.keys() == set(range(len(prompts)))


# Mistakes


def test_a_slot_without_a_row_holds_no_tokens(slm, strategy, prompts):
    decoder = Decoder(Engine(slm, 3), strategy("greedy"), max_new_tokens=20)
    requests = [Request(i, prompt, max_new_tokens=3 + i) for i, prompt in enumerate(prompts)]
    for _ in decoder.run(requests):
        lengths = decoder.engine.lengths
        assert all(length == 0 for length in lengths[len(decoder.batch.rows) :])
    assert decoder.engine.lengths == [0, 0, 0]


def test_more_candidates_than_tokens_is_one_clear_line(slm, strategy):
    with pytest.raises(ConfigError, match=r"1\.\.58 .*got 59; lower --num-candidates") as caught:
        Decoder(Engine(slm, 1), strategy("greedy", num_candidates=59))
    assert "\n" not in str(caught.value)


def test_a_strategy_without_its_llm_or_adapter_is_one_clear_line(slm, strategy):
    with pytest.raises(ConfigError, match="pass --llm"):
        Decoder(Engine(slm, 1), strategy("s2t", threshold=1.0))
    with pytest.raises(ConfigError, match="needs --adapter"):
        Decoder(Engine(slm, 1), strategy("s2t-local", threshold=1.0))
