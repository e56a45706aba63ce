"""Intervals, paired tests and hit rates: closed forms, known values and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from s2t.core.stats import (
    bootstrap_interval,
    calibration_error,
    clustered_difference_interval,
    clustered_rate_interval,
    detectable_difference,
    hit_rate_curve,
    holm_p_values,
    mcnemar_p_value,
    paired_comparison,
    pass_at,
    reliability_curve,
    sign_flip_p_value,
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


def test_all_wrong_or_all_right_leaves_room_for_other_rates():
    assert bootstrap_interval(np.zeros(30)) == (0.0, pytest.approx(0.1135, abs=1e-4))
    assert bootstrap_interval(np.ones(506, dtype=bool)) == (pytest.approx(0.9925, abs=1e-4), 1.0)
    assert bootstrap_interval(np.ones((3, 506))) == bootstrap_interval(np.ones(506))  # more seeds are not more problems
    assert bootstrap_interval(np.zeros(30), level=0.5) == wilson_interval(0, 30, 0.5)


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
    assert result.pop("detectable") == pytest.approx(detectable_difference(200, 0.0))
    _, width = wilson_interval(0, 200)
    assert result == {"difference": 0.0, "ci95": (-width, width), "p_value": 1.0, "wins": 0, "losses": 0}


def test_a_difference_without_spread_is_as_certain_as_its_items_are_many():
    low, high = paired_comparison([1, 1, 1], [0, 0, 0])["ci95"]
    assert 0 < low < 0.6 and high == 1
    templates = [f"t{i}" for i in range(12) for _ in range(5)]
    assert clustered_difference_interval(np.zeros(60), templates) == (
        -wilson_interval(0, 12)[1],
        wilson_interval(0, 12)[1],
    )
    low, high = clustered_difference_interval(-np.ones(60), templates)
    assert low == -1 and -1 < high < -0.5
    thirds = np.where(np.arange(60) % 10 < 5, 1, -1) / 3
    low, high = clustered_difference_interval(thirds, templates)
    assert low < 0 < high and low == pytest.approx(-high, abs=0.1)


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


# Seeds, many tests, power


def test_equal_seeds_add_nothing_and_different_ones_widen_the_interval():
    rng = np.random.default_rng(0)
    row = (rng.random(400) < 0.5).astype(float)
    low, high = bootstrap_interval(row)
    again = bootstrap_interval(np.stack([row] * 3))
    assert again == pytest.approx((low, high), abs=0.01)
    apart = np.stack([rng.random(400) < rate for rate in (0.3, 0.5, 0.7)])
    wide = bootstrap_interval(apart)
    assert wide[1] - wide[0] > 2 * (high - low)


def test_paired_comparison_over_seeds_is_that_of_one_when_all_seeds_agree():
    rng = np.random.default_rng(1)
    left, right = rng.random(300) < 0.6, rng.random(300) < 0.5
    one, three = paired_comparison(left, right), paired_comparison(np.stack([left] * 3), right)
    assert three["difference"] == pytest.approx(one["difference"])
    assert three["ci95"] == pytest.approx(one["ci95"], abs=0.01)
    assert (three["wins"], three["losses"]) == (one["wins"], one["losses"])
    assert three["p_value"] == pytest.approx(
        one["p_value"], abs=0.02
    )  # sign flips against McNemar: both exact tests of signs
    with pytest.raises(ValueError, match="same problems"):
        paired_comparison(np.stack([left] * 2), right[:-1])


def test_sign_flips_find_the_exact_p_value_and_the_level_holds():
    assert sign_flip_p_value([1.0] * 6) == pytest.approx(2 / 64, abs=0.006)
    assert sign_flip_p_value([0.0, 0.0]) == 1.0
    rng = np.random.default_rng(2)
    rejected = [sign_flip_p_value(rng.normal(size=40), 400, seed) < 0.05 for seed in range(400)]
    assert 0.02 < np.mean(rejected) < 0.085


def test_holm_has_its_textbook_values():
    assert holm_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_p_values([]) == []
    assert holm_p_values([0.7, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(("n", "discordance"), [(200, 0.3), (1000, 0.2), (1000, 0.05)])
def test_the_detectable_difference_is_found_four_times_in_five(n: int, discordance: float):
    difference = detectable_difference(n, discordance)
    assert 0 < difference < discordance
    rng = np.random.default_rng(0)
    wins, losses = (discordance + difference) / 2, (discordance - difference) / 2
    counts = rng.multinomial(n, [wins, losses, 1 - discordance], size=2000)
    found = [mcnemar_p_value(int(w), int(x)) < 0.05 for w, x, _ in counts]
    assert 0.72 < np.mean(found) < 0.86  # the exact test is a little more careful than the formula


@pytest.mark.parametrize("n", [100, 1000])
def test_two_systems_that_hardly_differ_find_no_less_than_has_the_power(n: int):
    difference = detectable_difference(n, 0.0)
    rng = np.random.default_rng(1)
    wins = rng.binomial(n, difference, size=20_000)  # the most favourable case: no loss at all
    found = np.array([mcnemar_p_value(w, 0) < 0.05 for w in range(n + 1)])[wins]
    assert 0.78 <= found.mean() < 0.82
    assert detectable_difference(n, 3 / n) == difference < detectable_difference(n, 10 / n)


def test_detectable_difference_refuses_what_is_no_share():
    with pytest.raises(ValueError, match=r"within 0\.\.1"):
        detectable_difference(10, 1.5)


def test_pass_at_is_the_chance_over_all_subsets():
    from itertools import combinations

    marks = [True, False, False, True, False, False]
    for k in range(1, 7):
        drawn = [any(subset) for subset in combinations(marks, k)]
        assert pass_at(6, 2, k) == pytest.approx(np.mean(drawn))


# Quality of a score


def test_reliability_lies_on_the_diagonal_for_true_probabilities():
    rng = np.random.default_rng(6)
    probs = rng.random(20_000)
    bins = reliability_curve(probs, rng.random(20_000) < probs)
    assert sum(count for *_, count in bins) == 20_000
    assert all(abs(stated - rate) < 0.05 and low <= rate <= high for stated, rate, (low, high), _ in bins)
    assert reliability_curve([0.95, 1.0], [True, False]) == [(0.975, 0.5, pytest.approx((0.095, 0.905), abs=1e-3), 2)]


def test_calibration_error_is_zero_for_true_probabilities_and_the_gap_for_others():
    rng = np.random.default_rng(4)
    probs = rng.random(50_000)
    truth = rng.random(50_000) < probs
    assert calibration_error(probs, truth) < 0.02
    assert calibration_error(np.full(100, 0.9), np.zeros(100, dtype=bool)) == pytest.approx(0.9)


def test_rates_of_dependent_items_are_less_certain():
    rng = np.random.default_rng(5)
    owners = np.repeat(np.arange(50), 10)
    together = np.repeat(rng.random(50) < 0.5, 10)
    apart = rng.random(500) < 0.5
    wide, narrow = (clustered_rate_interval(hits, owners) for hits in (together, apart))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert all(math.isnan(bound) for bound in clustered_rate_interval([], []))


def test_a_rate_of_0_or_1_is_as_certain_as_its_owners_are_many():
    owners = np.repeat(np.arange(40), 5)
    assert clustered_rate_interval(np.ones(200, dtype=bool), owners) == wilson_interval(40, 40)
    assert clustered_rate_interval(np.zeros(200, dtype=bool), owners) == wilson_interval(0, 40)
