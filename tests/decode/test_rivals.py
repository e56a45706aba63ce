"""The closed form of each rule of the methods beside ours; the laws that all of them share are in test_extremes.py."""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from s2t.config import DecodeConfig
from s2t.core.support import kl_divergence
from s2t.decode.loop import Decoder
from s2t.decode.pair import Pair
from s2t.decode.steps import StepTexts
from s2t.errors import ConfigError
from s2t.methods import relay
from s2t.methods.strategies import build_strategy
from s2t.model.engine import Engine
from s2t.records import Request

TOP_1 = {"top_k": 1}
CRITICALITY = {"trigger": "criticality", "scope": "step"}
AT_RANDOM = {"trigger": "random", "threshold": 0.5}


def tokens(done):
    return [s.token_ids for s in done]


# Speculative sampling


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 1.0}, TOP_1], ids=["default", "hot", "greedy"])
def test_drafts_of_any_length_write_the_same(settings, rival):
    whole = [tokens(rival("speculative", draft_tokens=n, **settings)) for n in (1, 2, 5, 0)]
    assert whole[0] == whole[1] == whole[2] == whole[3]


def test_rejections_say_how_long_drafts_are_and_not_flips_against_greedy(rival, slm, new_model):
    itself = rival("speculative", models=(slm, new_model(0)), temperature=1.5)
    assert sum(s.num_triggered for s in itself) == 0
    assert tokens(itself) == tokens(rival("sample", temperature=1.5))
    assert tokens(itself) != tokens(rival("greedy"))
    assert sum(s.cost.llm_forwards for s in itself) * 3 < sum(s.cost.generated for s in itself)


def exact(llm, prompt, length, temperature):
    """p of every continuation of so many tokens, of the LLM alone, by enumeration."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for ids, p in found.items():
            engine = Engine(llm, 1)
            logits = engine.logits(engine.extend([0], [[*prompt, *ids]]))[0]
            for token, q in enumerate((logits.double() / temperature).softmax(-1).tolist()):
                if q > 1e-9:
                    longer[(*ids, token)] = p * q
        found = longer
    return found


def test_what_is_written_is_distributed_as_the_llms_own_samples(slm, llm, strategy):
    """Pairs of tokens, of 3,000 seeds, against their exact probabilities: chi-square over the likely ones and the rest."""
    from scipy.stats import chi2

    prompt, temperature, count = [5, 9, 12, 30, 7], 0.6, 3000
    truth = exact(llm, prompt, 1, temperature)
    how = strategy("speculative", temperature=temperature, top_p=1.0)
    requests = [Request(i, prompt, f"draw-{i}") for i in range(count)]
    done = Pair(slm, llm, batch_size=256).write(how, requests, 2)
    pairs = {}
    for sequence in done:
        pairs[sequence.token_ids[0]] = pairs.get(sequence.token_ids[0], 0) + 1
    assert statistic_is_small(pairs, {ids[0]: p for ids, p in truth.items()}, count, chi2)
    assert not statistic_is_small(
        {ids[0]: round(count * p) for ids, p in exact(slm, prompt, 1, temperature).items()},
        {ids[0]: p for ids, p in truth.items()},
        count,
        chi2,
    ), "the SLM's own distribution would pass as well, so nothing was tested"
    first = max(pairs, key=pairs.get)
    seconds = [s.token_ids[1] for s in done if s.token_ids[0] == first and len(s.token_ids) > 1]
    behind = {ids[0]: p for ids, p in exact(llm, [*prompt, first], 1, temperature).items()}
    assert statistic_is_small({t: seconds.count(t) for t in set(seconds)}, behind, len(seconds), chi2)


@pytest.mark.parametrize("problem", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_on_a_real_vocabulary_samples_are_the_llms_too(problem, tiny_slm, tiny_llm):
    """Of the embedded pair, in contexts where both are undecided: the first token of 4,000 drafts, at temperature 1.5."""
    from scipy.stats import chi2

    count, temperature = 4000, 1.5
    pair = Pair(tiny_slm, tiny_llm, batch_size=1000)
    words = "Liam has 12 apples and", "Mia reads 7 pages. Then she", "There are 30"
    prompt = [*pair.prompt(f"{words[problem]} how many?"), *tiny_slm.tokenizer(words[problem])["input_ids"]]
    how = build_strategy("speculative", DecodeConfig(temperature=temperature, top_p=1.0), {}, seed=problem)
    done = pair.write(how, [Request(i, prompt, f"draw-{i}") for i in range(count)], 1)
    observed = Counter(sequence.token_ids[0] for sequence in done)
    truth, other = (next_token(model, prompt, temperature) for model in (tiny_llm, tiny_slm))
    assert len(truth) == 1024 and sum(p * count >= 5 for p in truth.values()) >= 8
    assert statistic_is_small(observed, truth, count, chi2)
    drafted = {token: round(p * count) for token, p in other.items()}
    assert not statistic_is_small(drafted, truth, count, chi2), "the SLM's own would pass as well"


def next_token(loaded, prompt, temperature):
    """p of every token that may come next, uncached."""
    logits = masked(loaded, uncached(loaded, prompt).logits[0, -1]).double()
    return dict(enumerate((logits / temperature).softmax(-1).tolist()))


def statistic_is_small(observed, truth, count, chi2):
    likely = [token for token, p in truth.items() if p * count >= 5]
    expected = [truth[token] * count for token in likely]
    seen = [observed.get(token, 0) for token in likely]
    rest = count - sum(expected)
    if rest > 5:
        expected.append(rest)
        seen.append(count - sum(seen))
    statistic = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
    return chi2.sf(statistic, max(len(expected) - 1, 1)) > 1e-3


# Steps and spans


def test_a_span_holds_for_its_tokens_or_to_the_end_of_the_step(rival):
    checked = 0
    for sequence in rival("takeover", trigger="random", threshold=0.1, span_tokens=4):
        left = 0
        for step in sequence.steps:
            fires = step.value < 0.1 and step.index >= 3
            assert step.fired == (left > 0 or fires)
            left = (left or 4) - 1 if step.fired else 0
            checked += step.fired and not fires
            if step.token_id == 7:
                left = 0
    assert checked > 5


def test_a_step_that_is_kept_is_the_slms_and_one_that_is_not_is_the_llms(rival):
    """Of smart: the value of every place of a step is the mean probability of the drafted step."""
    for sequence in rival("smart", threshold=0.55, span_tokens=5):
        for step in sequence.steps:
            assert 0 <= step.value <= 1
            if not step.fired:
                assert step.value >= 0.55 and not step.flip


def test_the_marks_are_what_the_llm_says_uncached_behind_the_step(words, slm, llm, strategy, prompts):
    how = strategy("specreason", threshold=0.0, step_end="w7", span_tokens=6)
    [done] = Pair(slm, llm).write(how, [Request(0, prompts[0])], 24, keep_steps=True, trace=False)
    at, checked = 0, 0
    while at < len(done.token_ids):
        end = at
        while end < len(done.token_ids) - 1 and end - at < 5 and done.token_ids[end] != 7:
            end += 1
        step = done.token_ids[at : end + 1]
        engine = Engine(llm, 1)
        logits = engine.logits(engine.extend([0], [[*prompts[0], *done.token_ids[: end + 1], 11, 12]]))[0]
        assert {done.steps[i].value for i in range(at, end + 1)} == {float(logits[20:30].argmax())}
        at, checked = end + 1, checked + len(step)
    assert checked == len(done.token_ids)


def test_a_call_has_the_llm_write_so_many_tokens(rival, monkeypatch):
    monkeypatch.setattr(relay, "TAG", re.compile(r"w(\d+)$"))
    for sequence in rival("relay"):
        left = 0
        for step, before in zip(sequence.steps[1:], sequence.token_ids, strict=False):
            left = left - 1 if left else before - 1
            assert step.fired == (left >= 0), "every word calls for as many tokens as its number says"
            left = max(left, 0)


# Closed forms, uncached


def uncached(loaded, ids, **options):
    with torch.no_grad():
        return loaded.model(torch.tensor([ids]), **options)


def masked(loaded, logits):
    logits = logits[: loaded.vocab_size].clone().float()
    logits[list(loaded.reserved.all)] = -math.inf
    return logits


def contrastive(slm, llm, prompt, bare, ids):
    small, large = (masked(m, uncached(m, [*prompt, *ids]).logits[0, -1]).log_softmax(-1) for m in (slm, llm))
    kept = large >= math.log(0.1) + large.max()
    return torch.where(kept, large - small, -math.inf).argmax()


def context_aware(slm, llm, prompt, bare, ids):
    with_, without = (uncached(slm, [*p, *ids]).logits[0, -1] for p in (prompt, bare))
    return masked(slm, 1.5 * with_ - 0.5 * without).argmax()


def dola(slm, llm, prompt, bare, ids):
    output = uncached(slm, [*prompt, *ids], output_hidden_states=True)
    last = masked(slm, output.logits[0, -1]).log_softmax(-1)
    earlier = masked(slm, slm.model.lm_head(output.hidden_states[1][0, -1]).detach()).log_softmax(-1)
    assert kl_divergence(last.exp(), earlier.exp()) > 0
    return torch.where(last >= math.log(0.1) + last.max(), last - earlier, -math.inf).argmax()


@pytest.mark.parametrize(
    ("name", "rule"), [("contrastive", contrastive), ("context-aware", context_aware), ("dola", dola)]
)
def test_a_contrast_is_its_closed_form(name, rule, slm, llm, rival, prompts):
    for sequence, prompt in zip(rival(name, max_new_tokens=8), prompts, strict=True):
        for place, token in enumerate(sequence.token_ids):
            assert token == int(rule(slm, llm, prompt, prompt[len(prompt) // 2 :], sequence.token_ids[:place]))


def test_multiplex_feeds_the_mean_embedding_of_its_samples(slm, prompts):
    engine, prompt = Engine(slm, 1), prompts[0]
    engine.extend([0], [prompt])
    hidden, _ = engine.step([0], [[4]], mixtures={0: [4, 9, 9]})
    table = slm.model.get_input_embeddings()
    embeddings = table(torch.tensor([[*prompt, 4]]))
    embeddings[0, -1] = (table.weight[4] + 2 * table.weight[9]) / 3
    with torch.inference_mode():
        wanted = slm.model.get_decoder()(inputs_embeds=embeddings).last_hidden_state[0, -1]
    torch.testing.assert_close(hidden[0], wanted, rtol=1e-4, atol=1e-4)


# Triggers that are trained


@pytest.mark.parametrize("name", ["takeover", "s2t"])
def test_takeover_and_s2t_fire_on_criticality(name, rival):
    found = rival(name, **CRITICALITY, threshold=0.5)
    assert 0 < sum(s.num_triggered for s in found) < sum(s.cost.generated for s in found)


# Branches


def ended(adapter, ids, depth, stop=1):
    """The greedy branch of a candidate, uncached: its tokens, and the sum of log p behind the first one."""
    adapter.act(adapter.scope == "always")
    branch, total = list(ids), 0.0
    for _ in range(depth - 1):
        if branch[-1] == stop:
            break
        with torch.inference_mode():
            logits = adapter.base_model(torch.tensor([branch])).logits[0, -1]
        best = masked(adapter.loaded, logits).log_softmax(-1).max(-1)
        branch.append(int(best.indices))
        total += float(best.values)
    return branch, total


@pytest.mark.parametrize(("scope", "depth"), [("always", 2), ("always", 4), ("candidates", 3), ("step", 3)])
def test_branches_are_scored_at_their_ends_as_one_uncached_forward_each_would(scope, depth, rival, adapters, prompts):
    adapter, checked = adapters[scope], 0
    for sequence, prompt in zip(rival("local-branch", **AT_RANDOM, scope=scope, lookahead=depth), prompts, strict=True):
        for step in sequence.steps:
            if not step.fired:
                continue
            prefix = [*prompt, *sequence.token_ids[: step.index]]
            pairs = zip(step.candidates.ids, step.candidates.logprobs, step.scores, strict=True)
            for candidate, logprob, found in pairs:
                branch, total = ended(adapter, [*prefix, candidate], depth)
                count = len(branch) - len(prefix)
                wanted = (logprob + total) / count if scope == "step" else bins(adapter, branch, logprob)
                assert found == pytest.approx(wanted, abs=1e-3)
                checked += count == depth
            assert step.token_id == step.candidates.ids[max(range(4), key=lambda i: step.scores[i])]
    assert checked > 20


def bins(adapter, ids, logprob):
    """The score of the last token, with the LoRA on it alone under scope candidates."""
    tokens_, first = torch.tensor([ids]), len(ids) - 1
    adapter.act(adapter.scope == "always")
    with torch.inference_mode(), nullcontext() if adapter.scope == "always" else adapter.acting_from(first, len(ids)):
        hidden = adapter.base_model.get_decoder()(tokens_).last_hidden_state[:, -1:]
    return float(adapter.scores(hidden, tokens_[:, -1:], torch.tensor([[logprob]])))


@pytest.mark.parametrize(
    ("scope", "depth", "line"),
    [
        ("step", 1, "readout rank must be 0, or 2 and more; got 1"),
        ("candidates", 0, "readout bins must be 1, or 2 and more; got 0"),
        ("stream", 2, "another scope than stream"),
    ],
)
def test_an_adapter_that_cannot_read_so_far_ahead_is_refused_before_anything_is_written(scope, depth, line, rival):
    with pytest.raises(ConfigError, match=line):
        rival("local-branch", scope=scope, lookahead=depth, threshold=0.5)


def test_the_released_code_scores_by_expected_bins_alone_and_reads_the_llm_at_every_token(
    new_model, new_adapter, llm, strategy, prompts
):
    adapter = new_adapter(new_model(0), "always", prior_weight=0.0, num_bins=12, score_temperature=1.0)
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
    how = strategy("released", threshold=1.0, divergence="released-code")
    done = Pair(adapter.loaded, llm, adapter).write(how, requests, 24, keep_steps=True, trace=False)
    alone = Pair(adapter.loaded, llm, adapter, 1).write(how, requests, 24)
    assert tokens(done) == tokens(alone)
    adapter.act(True)
    checked = 0
    for sequence, prompt in zip(done, prompts, strict=True):
        assert sequence.cost.llm_forwards == sequence.cost.generated
        for step in sequence.steps:
            if step.fired:
                for candidate, found in zip(step.candidates.ids, step.scores, strict=True):
                    ids = torch.tensor([[*prompt, *sequence.token_ids[: step.index], candidate]])
                    with torch.inference_mode():
                        hidden = adapter.base_model.get_decoder()(ids).last_hidden_state[0, -1]
                    weights = (hidden @ adapter.selector.bins.T).softmax(-1).tolist()
                    assert found == pytest.approx(sum(w * b / 11 for b, w in enumerate(weights)), abs=1e-3)
                    checked += 1
    assert checked > 20


@pytest.mark.parametrize("rows", [2, 4])
def test_a_row_that_moves_while_it_waits_keeps_what_the_llm_read_of_it(
    rows, new_model, new_adapter, llm, strategy, prompts
):
    adapter = new_adapter(new_model(0), "always", prior_weight=0.0, num_bins=12, score_temperature=1.0)
    how = strategy("released", threshold=2.5, divergence="released-code")
    requests = [
        Request(i, prompt, max_new_tokens=4 + (5 * i + k) % 11)
        for k in range(4)
        for i, prompt in enumerate(prompts, k * len(prompts))
    ]
    one, many = (Pair(adapter.loaded, llm, adapter, n).write(how, requests, 24, keep_steps=True) for n in (1, rows))
    assert tokens(one) == tokens(many)
    for alone, beside in zip(one, many, strict=True):
        assert [step.value for step in alone.steps] == pytest.approx([step.value for step in beside.steps], abs=1e-3)


# What is refused, in one line


def test_a_server_that_lists_some_tokens_is_not_sampled_from(strategy):
    assert "speculative needs the LLM's whole distribution" in strategy("speculative").selector.lacks(20)
    assert strategy("speculative", top_k=20).selector.lacks(20) is None
    assert strategy("takeover", threshold=1.0).selector.lacks(20) is None


def test_a_method_with_a_trigger_of_its_own_takes_no_other(strategy):
    with pytest.raises(ConfigError, match="has a trigger of its own"):
        strategy("contrastive", trigger="entropy")
    with pytest.raises(ConfigError, match="needs --router"):
        strategy("r2r")


@pytest.mark.parametrize("name", ["specreason", "smart"])
def test_whole_steps_are_not_judged_beside_another_tokenizer(name, slm, strategy):
    by_text = SimpleNamespace(max_draft=1, num_listed=None, is_slm=False)
    texts = StepTexts(slm.tokenizer, "w7")
    with pytest.raises(ConfigError, match=f"strategy {name} judges whole steps, and a pair with different tokenizers"):
        Decoder(Engine(slm, 1), strategy(name), by_text, texts=texts)


@pytest.mark.parametrize(("tail", "end"), [("", "\n"), ("a", "\n\n"), ("a\n", "\n\n"), ("ab\n\nc", "\n\n")])
def test_a_step_ends_with_the_token_that_completes_its_end(tail, end):
    texts = StepTexts(SimpleNamespace(decode=lambda ids: ["\n", "b", "\n\nc"][ids[0]]), end)
    for token, piece in enumerate(["\n", "b", "\n\nc"]):
        assert texts.ends(tail, token) == ((tail + piece).count(end) > tail.count(end))
        assert texts.after(tail, token) == tail + piece
