"""The expected-bin score: bounds, extremes, and what lambda does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t.core.bins import candidate_score, expected_bin, target_bins

finite = st.floats(-20, 20, width=32)


@given(logits=st.lists(finite, min_size=2, max_size=20), shift=finite)
def test_the_expected_bin_lies_in_0_1_and_ignores_a_common_shift(logits, shift):
    value = expected_bin(torch.tensor(logits))
    assert -1e-6 <= value <= 1 + 1e-6
    torch.testing.assert_close(expected_bin(torch.tensor(logits) + shift), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_bins", [2, 16])
def test_the_expected_bin_of_known_logits(num_bins):
    assert float(expected_bin(torch.zeros(num_bins))) == pytest.approx(0.5, abs=1e-6)
    for b in range(num_bins):
        certain = torch.full((num_bins,), -50.0)
        certain[b] = 50.0
        assert float(expected_bin(certain)) == pytest.approx(b / (num_bins - 1), abs=1e-6)


@given(
    logprobs=st.lists(st.floats(-30, 0, width=32), min_size=2, max_size=16, unique=True),
    e=finite,
    temperature=st.floats(0.01, 10),
)
def test_with_lambda_1_and_a_constant_expected_bin_the_slm_keeps_its_order(logprobs, e, temperature):
    bins = torch.full((len(logprobs), 16), e)
    prior = torch.tensor(sorted(logprobs, reverse=True))  # best first, as proposed
    scores = candidate_score(bins, prior, temperature, 1.0)
    assert scores.argmax() == 0
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_with_lambda_0_the_prior_does_not_count():
    torch.manual_seed(0)
    bins = torch.randn(3, 8, 16)
    scores = candidate_score(bins, torch.randn(3, 8), 0.1, 0.0)
    torch.testing.assert_close(scores, expected_bin(bins) / 0.1)


def test_the_score_is_a_weighted_sum():
    torch.manual_seed(0)
    bins, prior = torch.randn(3, 8, 16), torch.randn(3, 8).bfloat16()
    scores = candidate_score(bins, prior, 0.5, 0.3)
    torch.testing.assert_close(scores, expected_bin(bins) * 2 + 0.3 * prior.float())
    assert scores.dtype == torch.float32


def test_evidence_beats_the_prior():
    bins = torch.zeros(2, 16)
    bins[1, 15] = 20.0  # the second candidate is surely good
    assert candidate_score(bins, torch.tensor([-0.1, -3.0]), 0.1, 1.0).argmax() == 1


@given(probs=st.lists(st.floats(0, 1, width=32), min_size=1), num_bins=st.integers(2, 32))
def test_target_bins_are_the_nearest_and_grow_with_the_probability(probs, num_bins):
    probs = torch.tensor(sorted(probs))
    bins = target_bins(probs, num_bins)
    assert bins.tolist() == sorted(bins.tolist())
    assert ((bins / (num_bins - 1) - probs).abs() <= 0.5 / (num_bins - 1) + 1e-5).all()


def test_target_bins_of_the_ends():
    assert target_bins(torch.tensor([0.0, 1.0, 1.0000001]), 16).tolist() == [0, 15, 15]
