"""Laws of divergence, entropy and rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t.config import DIVERGENCES
from s2t.core.stats import hit_rate_curve
from s2t.core.support import (
    Distribution,
    align_vocabulary,
    bucket_logprobs,
    divergence,
    entropy,
    kl_divergence,
    logprobs_at,
    propose,
    rank_among,
    rank_of,
    resolve_support,
    self_certainty,
    spread,
)
from s2t.errors import ConfigError

BUCKETED = tuple(kind for kind in DIVERGENCES if kind != "released-code")


def rows(low=-30.0, high=30.0, max_size=12, unique=False):
    """Two rows of logits of one size; `unique` values leave no doubt which are the best of a row."""
    number = st.floats(low, high, width=32)
    if unique:  # float32 logits that differ by less may have one log-probability
        number = st.integers(int(1000 * low), int(1000 * high)).map(lambda value: value / 1000)
    return st.integers(2, max_size).flatmap(
        lambda size: st.tuples(*(st.lists(number, min_size=size, max_size=size, unique=unique) for _ in range(2)))
    )


def full_kl(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(pair=rows(), support_size=st.integers(1, 14))
def test_divergence_is_finite_and_never_negative(kind, pair, support_size):
    llm, slm = map(torch.tensor, pair)
    value = divergence(llm, slm, support_size, kind)
    assert value.isfinite() and value >= 0
    assert value.dtype == torch.float32


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(pair=rows(), support_size=st.integers(1, 14), shift=st.floats(-5, 5, width=32))
def test_divergence_of_equal_distributions_is_zero(kind, pair, support_size, shift):
    logits = torch.tensor(pair[0])
    assert divergence(logits, logits, support_size, kind) == 0
    assert divergence(logits + shift, logits, support_size, kind) < 1e-4


@given(pair=rows(-12, 12), support_size=st.integers(1, 12))
def test_the_rest_bucket_makes_divergence_a_lower_bound_of_the_full_kl(pair, support_size):
    llm, slm = map(torch.tensor, pair)
    assert divergence(llm, slm, support_size) <= full_kl(llm, slm) + 1e-4
    assert divergence(llm, slm, support_size, "slm-llm") <= full_kl(slm, llm) + 1e-4


@given(pair=rows(-3, 3))
def test_divergence_on_the_whole_vocabulary_is_the_full_kl(pair):
    llm, slm = map(torch.tensor, pair)
    for kind, expected in (
        ("llm-slm", full_kl(llm, slm)),
        ("slm-llm", full_kl(slm, llm)),
        ("released-code", full_kl(llm, slm)),
    ):
        assert float(divergence(llm, slm, len(slm), kind)) == pytest.approx(float(expected), abs=1e-4)


@given(pair=rows())
def test_jensen_shannon_is_symmetric_and_at_most_log_2(pair):
    llm, slm = map(torch.tensor, pair)
    value = divergence(llm, slm, len(slm), "js")
    assert float(value) == pytest.approx(float(divergence(slm, llm, len(slm), "js")), abs=1e-5)
    assert value <= math.log(2) + 1e-5


def test_a_rest_too_small_for_float32_differences_is_still_measured():
    slm, llm = torch.tensor([20.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    assert float(divergence(llm, slm, 1)) == pytest.approx(float(full_kl(llm, slm)), rel=0.05)


def test_a_token_outside_the_support_still_counts():
    slm = torch.tensor([4.0, 3.0, 0.0, 0.0, 0.0])
    llm = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0])
    assert divergence(llm, slm, support_size=2) > 2


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(pair=rows(-8, 8, unique=True), padding=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=5))
def test_padded_vocabularies_of_different_size_agree(kind, pair, padding):
    llm, slm = map(torch.tensor, pair)
    value = divergence(llm, slm, 4, kind)
    padded_llm = torch.cat([llm, torch.tensor(padding)])
    padded_slm = align_vocabulary(slm, len(slm) + 3)  # its padding rows masked, as the engine leaves them
    torch.testing.assert_close(divergence(padded_llm, slm, 4, kind), value)
    torch.testing.assert_close(divergence(llm, padded_slm, 4, kind), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_takes_any_leading_shape(kind):
    torch.manual_seed(0)
    llm, slm = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    values = divergence(llm, slm, 5, kind)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values[1, 2], divergence(llm[1, 2], slm[1, 2], 5, kind))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_masked_tokens_leave_divergence_finite(kind):
    slm = torch.tensor([1.0, float("-inf"), 0.5, float("-inf")])
    llm = torch.tensor([0.0, 3.0, 0.5, float("-inf")])
    assert divergence(llm, slm, 4, kind).isfinite()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_logits_are_compared_in_float32(kind):
    torch.manual_seed(0)
    llm, slm = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    assert torch.equal(divergence(llm, slm, 8, kind), divergence(llm.float(), slm.float(), 8, kind))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="magic"):
        divergence(torch.zeros(4), torch.zeros(4), kind="magic")


def test_kl_of_disjoint_distributions_is_large_but_finite():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert 20 < kl_divergence(p, q) < 30


@given(pair=rows())
def test_entropy_lies_between_zero_and_the_uniform_one(pair):
    logits = torch.tensor(pair[0])
    assert 0 <= entropy(logits) <= math.log(len(logits)) + 1e-5


def test_entropy_of_known_distributions():
    assert float(entropy(torch.zeros(16))) == pytest.approx(math.log(16), abs=1e-5)
    certain = torch.full((8,), float("-inf"))
    certain[3] = 0.0
    assert entropy(certain) == 0


@given(pair=rows(), rounded=st.booleans())
def test_rank_is_the_place_in_a_stable_descending_sort(pair, rounded):
    logits = torch.tensor(pair[0])
    logits = logits.sign() if rounded else logits  # many ties
    order = logits.sort(descending=True, stable=True).indices
    places = rank_of(logits.expand(len(logits), -1), order)
    assert places.tolist() == list(range(len(logits)))
    assert order[0] == logits.argmax()


def test_rank_below_k_says_that_the_token_is_a_candidate():
    torch.manual_seed(0)
    logits, token = torch.randn(200, 30), torch.randint(30, (200,))
    for k in (1, 4, 16, 30):
        ids, _ = propose(logits, k)
        assert torch.equal((ids == token[:, None]).any(-1), rank_of(logits, token) < k)


@given(rows(max_size=40), st.integers(1, 12), st.booleans())
def test_rank_among_the_largest_is_the_rank(pair, count, rounded):
    logits, other = (torch.tensor([row]).round() if rounded else torch.tensor([row]) for row in pair)
    top = logits.topk(min(count, logits.shape[-1]))
    for ids in (other.argmax(-1), logits.argmin(-1), logits.argmax(-1)):
        assert torch.equal(rank_among(logits, ids, top.values, top.indices), rank_of(logits, ids))


@given(rows(max_size=40), st.integers(1, 12))
def test_one_pass_reads_what_the_single_functions_read(pair, count):
    logits = torch.tensor(pair)
    logits[:, -1] = float("-inf")  # may not be written
    ids = logits.topk(min(count, logits.shape[-1])).indices
    read, probs = Distribution(logits), logits.double().softmax(-1)
    buckets = torch.cat([probs.gather(-1, ids), probs.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], dim=-1).float()
    for _ in range(2):  # reading changes nothing
        torch.testing.assert_close(read.buckets(ids), buckets, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(read.logprobs(ids), logprobs_at(logits, ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read.entropy(), entropy(logits), rtol=1e-4, atol=1e-5)
    assert torch.equal(read.best[:, 0], logits.argmax(-1))


@given(ranks=st.lists(st.integers(0, 40), min_size=1))
def test_hit_rate_grows_with_k_and_reaches_one_at_the_whole_vocabulary(ranks):
    curve = list(hit_rate_curve(ranks, (1, 2, 4, 8, 16, 41)).values())
    assert curve == sorted(curve)
    assert curve[-1] == 1


def test_self_certainty_is_the_divergence_of_uniform_from_the_model():
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")], [3.0, 3.0, 3.0, float("-inf")]])
    p = logits[:, :3].softmax(-1)
    expected = (torch.full_like(p, 1 / 3) * ((1 / 3) / p).log()).sum(-1)
    assert self_certainty(logits) == pytest.approx(expected.tolist(), abs=1e-6)
    assert self_certainty(logits)[1] == 0.0
    assert self_certainty(5 * logits)[0] > self_certainty(logits)[0]  # surer


@given(pair=rows(), support_size=st.integers(1, 14))
def test_log_buckets_are_the_logarithms_of_the_buckets(pair, support_size):
    llm, slm = map(torch.tensor, pair)
    ids = llm.topk(min(support_size, len(llm))).indices
    found, probs = bucket_logprobs(slm, ids), Distribution(slm).buckets(ids)
    torch.testing.assert_close(found.exp(), probs[: len(found)], rtol=1e-4, atol=1e-6)
    assert len(found) == len(probs) - (len(ids) == len(slm))
    assert found.isfinite().all()


def listed(logits, count):
    logprobs = logits.float().log_softmax(-1)
    return torch.topk(logprobs, count, dim=-1)


@pytest.mark.parametrize("kind", BUCKETED)
@given(pair=rows(-12, 12), support_size=st.integers(1, 14))
def test_the_llms_support_gives_a_divergence_too(kind, pair, support_size):
    llm, slm = map(torch.tensor, pair)
    value = divergence(llm, slm, support_size, kind, "llm-top")
    assert value.isfinite()
    assert value >= 0
    assert divergence(llm, llm, support_size, kind, "llm-top") == 0


@given(pair=rows(-12, 12))
def test_with_all_tokens_in_it_a_support_may_be_anyones(pair):
    llm, slm = map(torch.tensor, pair)
    size = len(pair[0])
    values = [divergence(llm, slm, size, support=support) for support in ("slm-top", "llm-top")]
    assert values[0] == pytest.approx(float(values[1]), abs=1e-5)
    assert float(values[1]) == pytest.approx(float(full_kl(llm, slm)), abs=1e-4)


@given(pair=rows(-12, 12), support_size=st.integers(1, 12))
def test_the_llms_support_is_a_lower_bound_of_the_full_divergence(pair, support_size):
    llm, slm = map(torch.tensor, pair)
    assert divergence(llm, slm, support_size, support="llm-top") <= full_kl(llm, slm) + 1e-4


def test_the_support_is_the_llms_where_it_is_asked_for():
    llm, slm = torch.tensor([5.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 5.0, 4.0, 4.0])
    p, q = llm.softmax(-1), slm.softmax(-1)
    expected = p[0] * (p[0] / q[0]).log() + (1 - p[0]) * ((1 - p[0]) / (1 - q[0])).log()
    assert float(divergence(llm, slm, 1, support="llm-top")) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ConfigError, match="support must be slm-top or llm-top; got 'both'"):
        divergence(llm, slm, 1, support="both")


@given(pair=rows(-12, 12, unique=True), count=st.integers(1, 12))
def test_listed_tokens_and_the_rest_keep_their_probabilities_when_spread(pair, count):
    logits = torch.tensor(pair[0])[None]
    count = min(count, logits.shape[-1])
    top = listed(logits, count)
    filled = spread(top.indices, top.values, logits.shape[-1])
    torch.testing.assert_close(filled.gather(-1, top.indices), top.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(filled.exp().sum(-1), torch.ones(1), atol=1e-5, rtol=0)
    assert (filled.sort(descending=True, stable=True).values[:, :count] <= top.values + 1e-5).all()
    assert filled.argmax(-1).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", BUCKETED)
@given(pair=rows(-3, 3, unique=True), count=st.integers(1, 12))
def test_divergence_on_the_llms_support_needs_no_more_than_its_listed_tokens(kind, pair, count):
    llm, slm = (torch.tensor(row)[None] for row in pair)
    count = min(count, llm.shape[-1])
    top = listed(llm, count)
    told = spread(top.indices, top.values, llm.shape[-1])
    whole = divergence(llm, slm, count, kind, "llm-top")
    torch.testing.assert_close(divergence(told, slm, count, kind, "llm-top"), whole, atol=1e-3, rtol=1e-3)


def test_ids_of_no_use_are_passed_over_when_spread():
    filled = spread(torch.tensor([[2, -1, 9]]), torch.log(torch.tensor([[0.5, 0.2, 0.1]])), 4)
    assert filled[0].exp().tolist() == pytest.approx([0.2 / 3, 0.2 / 3, 0.5, 0.2 / 3], abs=1e-6)


def test_what_a_server_cannot_tell_is_refused():
    assert resolve_support("auto", 64, "llm-slm", None) == ("slm-top", 64)
    assert resolve_support("llm-top", 64, "llm-slm", None) == ("llm-top", 64)
    assert resolve_support("auto", 64, "js", 20) == ("llm-top", 20)
    assert resolve_support("llm-top", 10, "llm-slm", 20) == ("llm-top", 10)
    with pytest.raises(ConfigError, match=r"support slm-top .* a server tells its 20 likeliest"):
        resolve_support("slm-top", 64, "llm-slm", 20)
    with pytest.raises(ConfigError, match="divergence released-code needs"):
        resolve_support("auto", 64, "released-code", 20)
