"""Intervals, paired tests and hit rates: closed forms, known values and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from s2t.core.stats import (
    bootstrap_interval,
    hit_rate_curve,
    mcnemar_p_value,
    paired_comparison,
    wilson_interval,
)


def test_wilson_interval_has_its_published_value():
    # Newcombe 1998, table I, method 3: 81 of 263 and 15 of 148.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_wilson_interval_holds_the_rate_and_mirrors(n: int):
    for successes in range(n + 1):
        low, high = wilson_interval(successes, n)
        assert 0 <= low <= successes / n <= high <= 1
        assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_no_trial_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        wilson_interval(4, 3)


def test_bootstrap_interval_approaches_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_bootstrap_interval_is_a_function_of_the_seed():
    values = np.arange(30.0)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_bootstrap_in_chunks_equals_bootstrap_at_once(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(values, num_resamples=1000)
    monkeypatch.setattr("s2t.core.stats._CHUNK_VALUES", 333)
    assert bootstrap_interval(values, num_resamples=1000) == pytest.approx(whole)


def test_bootstrap_of_a_constant_is_a_point_and_of_nothing_an_error():
    assert bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval(np.array([]))


def test_mcnemar_is_the_two_sided_binomial():
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(5, 5) == 1.0
    assert mcnemar_p_value(10, 0) == pytest.approx(2 / 2**10)
    assert mcnemar_p_value(12, 3) == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    assert mcnemar_p_value(3, 12) == mcnemar_p_value(12, 3)
    assert mcnemar_p_value(3000, 0) == pytest.approx(0.0)


def test_a_system_against_itself_never_differs():
    row = np.random.default_rng(0).random(200) < 0.4
    result = paired_comparison(row, row)
    assert result == {"difference": 0.0, "ci95": (0.0, 0.0), "p_value": 1.0, "wins": 0, "losses": 0}


def test_paired_comparison_counts_and_mirrors():
    left = np.array([True] * 60 + [False] * 40)
    right = np.array([True] * 30 + [False] * 65 + [True] * 5)
    ahead, behind = paired_comparison(left, right), paired_comparison(right, left)
    assert (ahead["wins"], ahead["losses"]) == (30, 5)
    assert ahead["difference"] == pytest.approx(left.mean() - right.mean())
    assert ahead["ci95"][0] < ahead["difference"] < ahead["ci95"][1]
    assert behind["difference"] == -ahead["difference"]
    assert behind["p_value"] == ahead["p_value"]


def test_paired_comparison_needs_the_same_problems():
    with pytest.raises(ValueError, match="same problems"):
        paired_comparison(np.ones(3, dtype=bool), np.ones(4, dtype=bool))


def test_hit_rate_grows_with_k_up_to_one():
    ranks = np.array([0, 0, 1, 3, 7, 40])
    curve = hit_rate_curve(ranks, (1, 2, 4, 8, 41))
    assert curve == pytest.approx({1: 2 / 6, 2: 3 / 6, 4: 4 / 6, 8: 5 / 6, 41: 1.0})


def test_hit_rate_of_no_steps_is_not_a_number():
    assert all(math.isnan(rate) for rate in hit_rate_curve(np.array([], dtype=int), (1, 8)).values())
