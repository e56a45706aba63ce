"""The rule of a step: bounds and extremes of the expected bin, what lambda does, what fires, what wins, and what ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t.core.rule import criticality, expected_bin, finish_reason, fires, score, winner

finite = st.floats(-20, 20, width=32)


def candidate_score(bin_logits, slm_logprobs, temperature, prior_weight):
    return score(expected_bin(bin_logits) / temperature, slm_logprobs, 1.0, prior_weight)


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


# The same rule on tensors, as the engine has them, and on plain numbers, as a server tells them


@given(
    readings=st.lists(finite, min_size=1, max_size=8),
    weight=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    prior=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_numbers_and_tensors_have_one_score_and_one_winner(readings, weight, prior):
    logprobs = [-0.5 * place for place in range(len(readings))]
    numbers = [score(*pair, weight, prior) for pair in zip(readings, logprobs, strict=True)]
    tensor = score(torch.tensor(readings).double(), torch.tensor(logprobs), weight, prior)
    torch.testing.assert_close(tensor, torch.tensor(numbers), rtol=1e-5, atol=1e-5)
    assert numbers[winner(numbers)] == max(numbers) and winner(numbers) == numbers.index(max(numbers))


def test_a_prior_of_weight_0_may_be_minus_infinity():
    assert score(0.5, float("-inf"), 1.0, 0.0) == 0.5
    assert score(torch.tensor([0.5]), torch.tensor([float("-inf")]), 1.0, 0.0).tolist() == [0.5]


def test_what_is_not_known_never_wins():
    assert winner([None, -3.0, None, -2.0, -2.0]) == 3


@given(logits=st.lists(finite, min_size=2, max_size=20), scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_log_probabilities_are_read_as_logits_are(logits, scale):
    """A common shift, which the softmax over all tokens is, changes neither bins nor criticality; float64 stays as it is."""
    told = torch.tensor(logits).double().log_softmax(-1)
    assert expected_bin(told * scale, scale).dtype == torch.float64
    torch.testing.assert_close(expected_bin(told * scale, scale), expected_bin(torch.tensor(logits).double()))
    both = [criticality((each[0] - each[1]) * scale, scale) for each in (told, torch.tensor(logits).double())]
    torch.testing.assert_close(*both)
    assert 0 <= both[0] <= 1


def test_a_trigger_fires_above_its_threshold_and_not_at_it():
    assert not fires(0.7, 0.7) and fires(0.7000001, 0.7)
    assert fires(torch.tensor([0.6, 0.7, 0.8], dtype=torch.float64), 0.7).tolist() == [False, False, True]


def test_a_stop_comes_before_the_limit():
    found = [finish_reason(stop, written, 8) for stop in (False, True) for written in (7, 8)]
    assert found == [None, "length", "stop", "stop"]
