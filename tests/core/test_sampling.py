"""Sampling: the right distribution, from numbers that depend on nothing but seed and key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t.core.sampling import filter_logits, sample, uniforms

LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, float("-inf"), 0.5])
logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30)


def test_samples_follow_the_distribution():
    count = 20_000
    draws = torch.from_numpy(uniforms(0, "distribution", count))
    tokens = sample(LOGITS.expand(count, -1), draws)
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / count
    torch.testing.assert_close(shares, LOGITS.softmax(-1), rtol=0, atol=0.015)


@given(row=logit_rows, u=st.floats(0, 1, exclude_max=True))
def test_a_sample_is_the_inverse_of_the_cumulative_distribution(row, u):
    token = int(sample(torch.tensor([row]), torch.tensor([u], dtype=torch.float64)))
    cumulative = torch.tensor(row).double().softmax(-1).cumsum(-1)
    assert u <= cumulative[token] + 1e-9
    assert token == 0 or u >= cumulative[token - 1] - 1e-9


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_at_minus_infinity_is_never_sampled(u):
    torch.manual_seed(0)
    logits = torch.randn(500, 40)
    logits[:, :5], logits[:, 20:25], logits[:, 35:] = (float("-inf"),) * 3
    tokens = sample(logits, torch.full((500,), u, dtype=torch.float64))
    assert logits.gather(-1, tokens[:, None]).isfinite().all()


def test_a_sample_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    logits, draws = torch.randn(6, 50), torch.rand(6, dtype=torch.float64)
    together = sample(logits, draws)
    for row in range(6):
        assert sample(logits[row : row + 1], draws[row : row + 1]) == together[row]


def test_uniforms_depend_on_seed_and_key_alone():
    first = uniforms(3, "problem/0", 100)
    assert np.array_equal(first, uniforms(3, "problem/0", 100))
    assert np.array_equal(first[:10], uniforms(3, "problem/0", 10))  # a longer limit changes nothing before it
    assert not np.array_equal(first, uniforms(4, "problem/0", 100))
    assert not np.array_equal(first, uniforms(3, "problem/1", 100))
    assert ((first >= 0) & (first < 1)).all()


@given(
    row=logit_rows,
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_the_best_token_passes_every_filter(row, temperature, top_k, top_p, min_p):
    logits = torch.tensor([row])
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    assert kept[0, logits[0].argmax()].isfinite()
    assert kept.max() == kept[0, logits[0].argmax()]


def test_no_filter_leaves_the_logits():
    assert torch.equal(filter_logits(LOGITS[None]), LOGITS[None])


def kept_ids(**how):
    return filter_logits(LOGITS[None], **how)[0].isfinite().nonzero()[:, 0].tolist()


def test_top_k_keeps_the_k_best():
    assert kept_ids(top_k=1) == [0]
    assert kept_ids(top_k=3) == [0, 2, 5]
    assert kept_ids(top_k=100) == [0, 1, 2, 3, 5]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probs = LOGITS.softmax(-1).sort(descending=True).values
    two = float(probs[:2].sum())
    assert kept_ids(top_p=two - 1e-3) == [0, 2]
    assert kept_ids(top_p=two + 1e-3) == [0, 2, 5]
    assert kept_ids(top_p=1e-6) == [0]


def test_min_p_is_a_share_of_the_best_probability():
    assert kept_ids(min_p=float(np.exp(-1.1))) == [0, 2]
    assert kept_ids(min_p=1.0) == [0]


def test_filters_work_on_what_the_one_before_left():
    # of the two best, the first has 73 %: enough for top-p once top-k has cut the rest
    assert kept_ids(top_k=2, top_p=0.7) == [0]
    assert kept_ids(top_p=0.7) == [0, 2]


def test_a_low_temperature_is_greedy():
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    cold = filter_logits(logits, temperature=1e-3)
    assert torch.equal(sample(cold, torch.rand(50, dtype=torch.float64)), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter: many equal ones
def test_top_p_of_a_wide_vocabulary_is_that_of_all_tokens_in_order(dtype):
    """Rows of every sharpness, the flattest of which need more tokens than are looked at first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5000, generator=generator) * torch.tensor([0.01, 0.5, 1.0, 3.0, 9.0, 50.0])[:, None]
    logits[:, 7] = float("-inf")
    logits = logits.to(dtype).float()
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(-1)
    dropped = (probs.cumsum(-1) - probs >= 0.9).scatter(-1, ids, probs.cumsum(-1) - probs >= 0.9)
    kept = filter_logits(logits, top_p=0.9)
    assert torch.equal(kept, logits.masked_fill(dropped, float("-inf")))
    counts = (kept > float("-inf")).sum(-1).tolist()
    assert counts[0] > 4000 > counts[-1] == 1
