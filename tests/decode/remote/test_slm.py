"""S2T-LOCAL over a completions API equals the engine in this process, whatever the chunks and whatever the server lists.

The server is a fake that reads a random model without a cache; tests/vllm has the same against vLLM.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import torch

from s2t.core.insampler import Plugin
from s2t.decode.loop import Decoder
from s2t.decode.remote import slm as remote
from s2t.decode.remote.selector import ServedSelector, check_apart, served_selector
from s2t.decode.remote.slm import RemoteDecoder
from s2t.decode.remote.wire import Completion
from s2t.errors import ConfigError, RemoteError
from s2t.model.engine import Engine
from s2t.records import Request

HALF = {"trigger": "random", "threshold": 0.5}
SETTINGS = [{"threshold": 0.5}, HALF, {"trigger": "random", "threshold": 1.5}, {"trigger": "never"}]
KNOWN: dict[tuple, torch.Tensor] = {}  # log-probabilities behind a prefix
READERS = {
    "always": {},
    "stream": {},
    "rank-stream": {},
    "always, weight 0.4": {"adapter_weight": 0.4},
    "stream, weight 0.4": {"adapter_weight": 0.4},
    "rank-stream, weight 0.4": {"adapter_weight": 0.4},
    "rank-stream, weight 0": {"adapter_weight": 0.0},
}
every_scope = pytest.mark.parametrize("scope", READERS)
pluggable = pytest.mark.parametrize("scope", [name for name in READERS if not name.startswith("stream")])


class FakeServer:
    """What vLLM would answer: greedy tokens under a bias, raw log-probabilities of listed ids or of the likeliest."""

    def __init__(self, adapter, lists_top=True, leaks=False, most=None):
        self.adapter, self.lists_top, self.leaks, self.most = adapter, lists_top, leaks, most
        self.requests = []

    def stream(self, work):
        items = []
        asyncio.run(work(self, items.append))
        return iter(items)

    async def complete_all(self, requests):
        return [await self.complete(request) for request in requests]

    async def complete(self, request):
        self.requests.append(replace(request, prompt_ids=tuple(request.prompt_ids)))
        body = request.body("base")
        if self.most is not None and (request.logprobs or 0) > self.most:
            raise RemoteError(f"at most {self.most} logprobs", 400)
        assert (
            body["temperature"] == 0.0 and (body.get("logprobs") is None) == (request.logprob_token_ids is None)
        ) or (request.logprobs is not None)
        ids, written, listed = list(request.prompt_ids), [], []
        for _ in range(request.max_tokens):
            logprobs = self.read(ids, request.model)
            biased = logprobs.clone()
            for i, value in body.get("logit_bias", {}).items():
                biased[int(i)] += value
            token = int(biased.argmax())
            wanted = list(request.logprob_token_ids or ())
            if request.logprobs is not None:
                wanted = logprobs.topk(request.logprobs).indices.tolist() if self.lists_top else []
            ids.append(token)
            written.append(token)
            listed.append({i: float(logprobs[i]) for i in {token, *wanted}})
            if token in body.get("stop_token_ids", ()):
                break
        return Completion(written, listed, [], "", "stop")

    def read(self, ids, model):
        acts = self.adapter.scope == "always" or model is not None or (self.leaks and len(self.requests) > 1)
        key = (id(self.adapter), acts, *ids)
        if key not in KNOWN:
            KNOWN[key] = self.forward(ids, acts)
        return KNOWN[key]

    @torch.inference_mode()
    def forward(self, ids, acts):
        adapter = self.adapter
        adapter.act(acts)
        state = adapter.base_model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[
            0, -1
        ]
        adapter.act(False)
        logits = adapter.base_model.get_output_embeddings()(state).float()
        if not adapter.ranks:
            logits[list(adapter.reserved.bins)] = adapter.selector.bin_logits(state)
        logits[list(adapter.reserved.criticality)] = adapter.selector.yes_no @ state
        return logits.log_softmax(-1)


class PluggedServer(FakeServer):
    """One that runs the logits processor; `loses` every n-th call of it."""

    def __init__(self, adapter, loses=0):
        super().__init__(adapter)
        self.loses, self.calls, self.plugin = loses, 0, Plugin(64)
        self.asked = []

    async def complete(self, request):
        if "vllm_xargs" in request.body("base"):
            return (await self.complete_rows(request))[0]
        return await super().complete(request)

    async def complete_rows(self, request):
        self.calls += 1
        body, count = request.body("base"), 1 + len(request.more_prompts)
        self.asked.append((request.model, count))
        args, marks = body["vllm_xargs"], body["stop_token_ids"]
        assert "logit_bias" not in body and "logprobs" not in body
        if self.loses and self.calls % self.loses == 0:
            return [Completion([3, marks[-1]], [], [], "", "stop") for _ in range(count)]
        rows = [(self.plugin.new_row(args), []) for _ in range(count)]
        while running := [r for r in rows if not r[1] or r[1][-1] not in marks]:
            logits = torch.stack([self.read([*request.prompt_ids, *out], request.model) for _, out in running]).clone()
            self.plugin.apply(logits, [(i, row, len(out)) for i, (row, out) in enumerate(running)])
            for line, (_, out) in zip(logits, running, strict=True):
                out.append(int(line.argmax()))
        assert all(len(out) <= request.max_tokens for _, out in rows)
        return [Completion(out, [], [], "", "stop") for _, out in rows]


class Narrow(PluggedServer):
    """One with a longest sequence, which refuses what could exceed it."""

    def __init__(self, adapter, longest):
        super().__init__(adapter)
        self.longest = longest

    async def complete(self, request):
        assert len(request.prompt_ids) + request.max_tokens <= self.longest
        return await super().complete(request)

    async def complete_rows(self, request):
        assert len(request.prompt_ids) + request.max_tokens <= self.longest
        return await super().complete_rows(request)


@pytest.fixture(scope="module")
def prompts():
    return ([5, 9, 12, 30, 7], [8], [22, 31, 6], [17, 17, 2, 35])


@pytest.fixture(scope="module")
def readers(new_model, new_adapter):
    return {
        name: new_adapter(new_model(0), name.split(",")[0], criticality="reserved", **changes)
        for name, changes in READERS.items()
    }


def served(adapter):
    lora = "s2t" if adapter.scope == "stream" else None
    return ServedSelector(adapter.config, adapter.reserved.bins, adapter.reserved.criticality, lora=lora)


def write(adapter, how, prompts, server=None, trace=False, limit=16, **settings):
    server = server or FakeServer(adapter)
    decoder = RemoteDecoder(server, adapter.loaded, how, served(adapter), limit, trace, num_rows=4, **settings)
    steps = list(decoder.run([Request(i, prompt, f"problem-{i}") for i, prompt in enumerate(prompts)]))
    return decoder, [[step for step in steps if step.request == i] for i in range(len(prompts))]


def write_here(adapter, how, prompts, limit=16):
    requests = [Request(i, prompt, f"problem-{i}") for i, prompt in enumerate(prompts)]
    steps = list(Decoder(Engine(adapter.loaded, 6, adapter), how, None, limit).run(requests))
    return [[step for step in steps if step.request == i] for i in range(len(prompts))]


@every_scope
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda found: str(found.get("trigger", "criticality")))
@pytest.mark.parametrize("lists_top", [True, False], ids=["top-k", "garbled"])
def test_tokens_and_steps_are_those_of_the_engine_here(scope, settings, lists_top, readers, strategy, prompts):
    adapter, how = readers[scope], strategy("s2t-local", **settings)
    wanted = write_here(adapter, how, prompts)
    _, found = write(adapter, how, prompts, FakeServer(adapter, lists_top), trace=True)
    _, quick = write(adapter, how, prompts, FakeServer(adapter, lists_top))
    for ours, theirs, short in zip(wanted, found, quick, strict=True):
        assert [s.token_id for s in theirs] == [s.token_id for s in short] == [s.token_id for s in ours]
        for one, other, brief in zip(ours, theirs, short, strict=True):
            facts = ("index", "greedy_id", "fired", "finish_reason", "selected_index")
            assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
            assert (one.value is None) == (other.value is None)
            assert one.value is None or other.value == pytest.approx(one.value, abs=1e-4)
            if one.fired:
                assert other.candidates.ids == one.candidates.ids
                gaps = {a - b for a, b in zip(other.candidates.logprobs, one.candidates.logprobs, strict=True)}
                assert max(gaps) - min(gaps) < 1e-4  # reserved ids share in a server's log-probabilities
                gaps = {a - b for a, b in zip(other.scores, one.scores, strict=True)}
                assert max(gaps) - min(gaps) < 1e-3
                assert len(brief.scores) <= len(other.scores) == len(one.scores) == how.num_candidates
    fired = sum(step.fired for steps in wanted for step in steps)
    assert (fired > 0) == (settings.get("trigger") != "never")


def test_a_server_that_lists_too_few_is_asked_for_candidates_one_by_one(readers, strategy, prompts):
    scope = next(name for name in readers if name.startswith("always"))
    adapter, how = readers[scope], strategy("s2t-local", **SETTINGS[0])
    _, found = write(adapter, how, prompts, FakeServer(adapter, most=how.num_candidates), trace=True)
    wanted = write_here(adapter, how, prompts)
    assert [[s.token_id for s in steps] for steps in found] == [[s.token_id for s in steps] for steps in wanted]


@pluggable
@pytest.mark.parametrize("settings", [*SETTINGS[:3], {"threshold": 0.8}], ids=str)
@pytest.mark.parametrize("loses", [0, 2, 3], ids=["", "loses half", "loses a third"])
def test_a_server_with_the_plugin_writes_the_same(scope, settings, loses, readers, strategy, prompts):
    adapter, how = readers[scope], strategy("s2t-local", **settings)
    wanted = write_here(adapter, how, prompts)
    server = PluggedServer(adapter, loses)
    decoder, found = write(adapter, how, prompts, server, uses_plugin=True)
    for ours, theirs in zip(wanted, found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            for name in ("index", "token_id", "greedy_id", "fired", "finish_reason", "selected_index"):
                assert getattr(one, name) == getattr(other, name), name
            if settings.get("trigger") == "random":
                assert other.value == one.value
    assert decoder.costs.keys() == set(range(len(prompts))) and server.calls > 0
    assert loses or not server.requests  # nothing is listed, found or scored beside it


def test_traces_and_scope_stream_do_without_the_plugin(readers, strategy, prompts):
    for scope, trace in (("always", True), ("stream", False)):
        server = PluggedServer(readers[scope])
        write(readers[scope], strategy("s2t-local", threshold=0.5), prompts, server, trace, uses_plugin=True)
        assert server.calls == 0 and server.requests


def test_what_a_server_can_hold_is_not_asked_for(readers, strategy, prompts):
    adapter, how = readers["always"], strategy("s2t-local", threshold=0.5)
    wanted = write_here(adapter, how, prompts)
    for most in (24, 50):  # the marks alone take most of 24 tokens
        _, found = write(adapter, how, prompts, PluggedServer(adapter), uses_plugin=True, max_length=most)
        assert [[s.token_id for s in own] for own in found] == [[s.token_id for s in own] for own in wanted]


@pytest.mark.parametrize("scope", [name for name in READERS if not name.endswith("weight 0")])
def test_chunk_lengths_change_no_token(scope, readers, strategy, prompts, monkeypatch):
    adapter, how = readers[scope], strategy("s2t-local", threshold=0.5)
    found = []
    for cost in (0.01, 4.0, 1000.0):
        monkeypatch.setattr(remote, "REQUEST_COST", cost)
        server = FakeServer(adapter)
        decoder, steps = write(adapter, how, prompts, server)
        found.append(([[s.token_id for s in own] for own in steps], len(server.requests), decoder.num_dropped))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] > found[2][1] and found[0][2] < found[2][2]


@pytest.mark.parametrize("lists_top", [True, False], ids=["top-k", "garbled"])
@pytest.mark.parametrize("scope", ["rank-stream", "rank-stream, weight 0.4", "rank-stream, weight 0"])
def test_a_trigger_of_readout_rank_is_one_request_under_the_lora(scope, lists_top, readers, strategy, prompts):
    adapter, how, server = readers[scope], strategy("s2t-local", **HALF), FakeServer(readers[scope], lists_top)
    _, steps = write(adapter, how, prompts, server)
    fired = {
        (*prompt, *(step.token_id for step in own[: step.index])): step
        for prompt, own in zip(prompts, steps, strict=True)
        for step in own
        if step.fired
    }
    asked = Counter(tuple(request.prompt_ids) for request in server.requests if request.model == "s2t")
    if adapter.config.adapter_weight == 0:  # greedy, whatever it says
        assert not asked and not any(step.flip for step in fired.values())
        return
    assert asked.keys() == fired.keys() and all(r.max_tokens == 1 for r in server.requests if r.model == "s2t")
    assert any(step.flip for step in fired.values()) and 1 in asked.values()
    for prefix, step in fired.items():
        if len(step.candidates.ids) == 1:
            assert asked[prefix] == 1 and not step.flip
        elif adapter.config.adapter_weight == 1:  # asked again only where what it names first is no candidate
            assert asked[prefix] == (1 if None in step.scores or len(step.scores) == 2 else 2)
        assert asked[prefix] <= 2


def test_a_row_of_the_plugin_ranks_a_trigger(readers, strategy, prompts):
    server = PluggedServer(readers["rank-stream"])
    how = strategy("s2t-local", threshold=0.5)
    _, steps = write(readers["rank-stream"], how, prompts, server, uses_plugin=True)
    models = [model for model, rows in server.asked for _ in range(rows)]
    assert models.count("s2t") == sum(step.fired for own in steps for step in own) > 0
    assert set(models) == {None, "s2t"}
    server = PluggedServer(readers["rank-stream, weight 0"])
    _, steps = write(server.adapter, how, prompts, server, uses_plugin=True)
    assert {model for model, _ in server.asked} == {None} and any(step.fired for own in steps for step in own)


def test_what_cannot_win_is_neither_looked_for_nor_scored(new_model, new_adapter, strategy, prompts):
    adapter = new_adapter(
        new_model(0), "always", criticality="reserved", score_temperature=2.0
    )  # a lead of 0.5 nats at most
    how = strategy("s2t-local", **HALF)
    calls = {}
    for trace in (False, True):
        server = FakeServer(adapter, lists_top=False)
        write(adapter, how, prompts, server, trace=trace)
        calls[trace] = len(server.requests)
    assert calls[False] < 0.9 * calls[True]


def test_reserved_ids_are_biased_away_and_costs_are_counted(readers, strategy, prompts):
    adapter, how = readers["stream"], strategy("s2t-local", **HALF)
    server = FakeServer(adapter)
    decoder, steps = write(adapter, how, prompts, server)
    forbidden = {*adapter.reserved.all, *range(adapter.loaded.vocab_size, 64)}
    assert all({int(i) for i in r.extra["logit_bias"]} >= forbidden for r in server.requests)
    assert not forbidden & {step.token_id for own in steps for step in own}
    assert {r.model for r in server.requests} == {None, "s2t"}
    assert decoder.costs.keys() == set(range(len(prompts)))
    for index, own in enumerate(steps):
        cost = decoder.costs[index]
        assert cost.generated == len(own) and cost.slm_forwards >= cost.generated
        assert cost.slm_processed >= len(prompts[index]) + cost.generated - 1 and cost.llm_forwards == 0


def test_a_server_that_writes_a_reserved_id_is_found_out(readers, strategy, prompts):
    class Careless(FakeServer):
        async def complete(self, request):
            done = await super().complete(request)
            done.token_ids[-1] = self.adapter.reserved.bins[0]
            return done

    adapter = readers["always"]
    with pytest.raises(ExceptionGroup) as caught:
        write(adapter, strategy("greedy"), prompts, Careless(adapter))
    assert isinstance(caught.value.exceptions[0], RemoteError) and "reserved id" in str(caught.value.exceptions[0])


@pytest.mark.parametrize("scope", ["stream", "rank-stream"])
def test_a_lora_that_acts_on_its_base_is_found_out(scope, readers):
    adapter = readers[scope]
    asyncio.run(check_apart(served(adapter), FakeServer(adapter)))
    with pytest.raises(ConfigError, match="--max-loras 2"):
        asyncio.run(check_apart(served(adapter), FakeServer(adapter, leaks=True)))


def test_a_faint_lora_is_told_from_its_base(new_model, new_adapter):
    adapter = new_adapter(new_model(0), "rank-stream", criticality="reserved")
    for size in (0.03, 0.0):
        with torch.no_grad():
            for name, weight in adapter.trainable().items():
                if "lora_B" in name:
                    weight.mul_(size)
        KNOWN.clear()
        asyncio.run(check_apart(served(adapter), FakeServer(adapter)))
        leaking = check_apart(served(adapter), FakeServer(adapter, leaks=True))
        if size:
            with pytest.raises(ConfigError, match="--max-loras 2"):
                asyncio.run(leaking)
        else:
            asyncio.run(leaking)  # it changes nothing
    KNOWN.clear()


# Mistakes


def test_what_no_server_can_run_is_one_clear_line(readers, strategy, new_model, tiny_slm):
    adapter = readers["always"]
    for how, words in (
        (strategy("sample"), "drop --slm-url"),
        (strategy("s2t-local", trigger="entropy", threshold=1.0), "takes trigger"),
    ):
        with pytest.raises(ConfigError, match=words):
            RemoteDecoder(FakeServer(adapter), adapter.loaded, how, served(adapter))
    head = ServedSelector(adapter.config, adapter.reserved.bins, None)
    with pytest.raises(ConfigError, match="--criticality reserved"):
        RemoteDecoder(FakeServer(adapter), adapter.loaded, strategy("s2t-local", threshold=0.5), head)
    with pytest.raises(ConfigError, match="s2t merge"):
        served_selector(tiny_slm, [], None)


@pytest.mark.parametrize("uses_plugin", [False, True])
def test_nothing_longer_is_asked_for_than_the_servers_take(uses_plugin, readers, strategy, prompts):
    adapter, how, longest = readers["always"], strategy("s2t-local", threshold=0.0), 14
    server = Narrow(adapter, longest)
    _, found = write(adapter, how, prompts, server, uses_plugin=uses_plugin, max_length=longest)
    for prompt, steps, ours in zip(prompts, found, write_here(adapter, how, prompts), strict=True):
        assert len(steps) == min(len(ours), longest - len(prompt) - 1)
        assert [step.token_id for step in steps] == [step.token_id for step in ours[: len(steps)]]
    with pytest.raises(ConfigError, match="prompt of 13 tokens leaves no room on a server that takes 14"):
        write(adapter, how, [[1] * 13], server, max_length=longest)


def test_a_sequence_whose_server_has_no_processor_after_all_stays_with_chunks(readers, strategy, prompts):
    adapter, how = readers["always"], strategy("s2t-local", threshold=0.3)
    server = PluggedServer(adapter, loses=1)
    _, found = write(adapter, how, prompts, server, uses_plugin=True)
    assert server.calls <= 3 * len(prompts)
    wanted = write_here(adapter, how, prompts)
    assert [[s.token_id for s in steps] for steps in found] == [[s.token_id for s in steps] for steps in wanted]
