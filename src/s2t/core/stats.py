"""Numbers that go with a score: intervals, paired tests and the hit-rate curve.

Arrays of per-problem or per-step values; knows no models and no files. Every resampling takes a seed and is a function of
it. scipy is imported where it is used, since most of the package never asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_CHUNK_VALUES = 2_000_000  # resampled values held at once: 16 MB


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) when there is no trial. ValueError if successes > n."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be within 0..{n}; got {successes}.")
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, num_resamples: int = 10000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; [N] or [S, N] -> (low, high).

    One row of N problems is resampled by problem. S rows are S seeds of the same problems: problems and seeds are both
    resampled, so that the interval covers other problems and other seeds. Values that are all 0 or all 1 are read as marks of
    an accuracy of 0 or 1, where resampling shows no spread: theirs is Wilson's of N. ValueError when there are no values.
    """
    array = _by_seed(values)  # [S, N]
    if (array == array[0, 0]).all() and array[0, 0] in (0, 1):
        n = array.shape[1]
        return wilson_interval(n * int(array[0, 0]), n, level)
    rng = np.random.default_rng(seed)
    means = _resampled_means(array, num_resamples, rng)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_comparison(left: ArrayLike, right: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Compare two systems on the same problems; two bool [N] or [S, N] -> difference, ci95, p_value, wins, losses, detectable.

    `difference` is the left accuracy minus the right one with a paired bootstrap interval; a win is a problem that the left
    one solves more often. `p_value` is the exact two-sided McNemar test, or a sign-flip test of the problems' mean gains where
    a side has several seeds. `detectable` is the smallest difference that this many problems show with 80 % power. ValueError
    when the rows differ in length or are empty.
    """
    ours, theirs = _by_seed(left), _by_seed(right)  # [S, N], [S', N]
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"both systems must have the same problems; got {ours.shape} and {theirs.shape}.")
    gains = ours.mean(0) - theirs.mean(0)  # [N]
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    is_single = len(ours) == len(theirs) == 1
    return {
        "difference": float(gains.mean()),
        "ci95": _paired_interval(ours, theirs, seed),
        "p_value": mcnemar_p_value(wins, losses) if is_single else sign_flip_p_value(gains, seed=seed),
        "wins": wins,
        "losses": losses,
        "detectable": detectable_difference(gains.size, float((gains**2).mean())),
    }


def sign_flip_p_value(gains: ArrayLike, num_resamples: int = 10000, seed: int = 0) -> float:
    """Two-sided permutation test that the mean gain is 0: signs of the problems' gains are drawn at random; float [N]."""
    array = np.asarray(gains, dtype=np.float64)
    array = array[array != 0]
    if array.size == 0:
        return 1.0
    rng, observed, extreme = np.random.default_rng(seed), abs(array.sum()), 0
    chunk = max(1, _CHUNK_VALUES // array.size)
    for start in range(0, num_resamples, chunk):
        signs = rng.integers(0, 2, (min(chunk, num_resamples - start), array.size)) * 2 - 1
        extreme += int((np.abs(signs @ array) >= observed - 1e-9).sum())
    return (extreme + 1) / (num_resamples + 1)


def holm_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: below 0.05 holds for all of them together.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def detectable_difference(n: int, discordance: float, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest difference of two accuracies that a paired test on n problems finds with this power.

    `discordance` is psi, the share of problems on which the two differ (the mean squared gain). A smaller psi than
    (z_a + z_b)^2 / n counts as that: with fewer differences the power is not reached even if all are on one side. A normal
    approximation, too hopeful below some 30 problems. Source: Connor 1987, the sample size of McNemar's test,
    n d^2 = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2, solved for d; at most psi. ValueError when n < 1 or psi is no share.
    """
    if n < 1 or not 0 <= discordance <= 1:
        raise ValueError(f"need n >= 1 and a discordance within 0..1; got {n} and {discordance}.")
    z_level, z_power = NormalDist().inv_cdf(1 - level / 2), NormalDist().inv_cdf(power)
    discordance = min(1.0, max(discordance, (z_level + z_power) ** 2 / n))
    low, high = 0.0, discordance  # psi >= |d|, since it counts every problem that d counts
    for _ in range(60):
        middle = (low + high) / 2
        needed = (z_level * math.sqrt(discordance) + z_power * math.sqrt(max(discordance - middle**2, 0))) ** 2
        low, high = (middle, high) if needed > n * middle**2 else (low, middle)
    return high


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Exact two-sided McNemar test: chance of a split at least this uneven among the discordant problems."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def hit_rate_curve(ranks: ArrayLike, ks: Iterable[int]) -> dict[int, float]:
    """Share of steps whose LLM token is among the first k SLM tokens; int [N] (0 = top) -> {k: rate}.

    Grows with k. Every rate is nan when there are no steps: nothing was measured.
    """
    array = np.asarray(ranks)  # [N]
    return {k: float((array < k).mean()) if array.size else math.nan for k in ks}


def pass_at(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples drawn from n, of which some are correct, is correct.

    Source: Chen et al. 2021 (arXiv 2107.03374), the unbiased pass@k.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def clustered_rate_interval(
    hits: ArrayLike, owners: ArrayLike, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a rate over items that belong to owners, who are resampled whole; bool [N], labels [N] -> (low, high).

    For divergence points, which of one problem are not independent. A rate of 0 or 1, where resampling shows no spread, has
    Wilson's interval of that many owners. (nan, nan) when there are no items.
    """
    marks = np.asarray(hits, dtype=np.float64)
    if marks.size == 0:
        return math.nan, math.nan
    _, owner = np.unique(np.asarray(owners), return_inverse=True)
    count, sums = np.bincount(owner).astype(float), np.bincount(owner, weights=marks)
    if marks.all() or not marks.any():
        return wilson_interval(len(count) if marks.all() else 0, len(count))
    weights = np.random.default_rng(seed).multinomial(
        len(count), np.full(len(count), 1 / len(count)), size=num_resamples
    )
    low, high = np.quantile((weights @ sums) / np.maximum(weights @ count, 1), [0.025, 0.975])
    return float(low), float(high)


def clustered_difference_interval(
    gains: ArrayLike, owners: ArrayLike, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a mean gain in [-1, 1] over items whose owners are resampled whole; float [N], labels [N] -> (low, high).

    Where no resample differs from another it is what `_of_no_spread` gives for that many owners. N is at least 1.
    """
    _, owner = np.unique(np.asarray(owners), return_inverse=True)
    count, sums = np.bincount(owner).astype(float), np.bincount(owner, weights=np.asarray(gains, dtype=np.float64))
    weights = np.random.default_rng(seed).multinomial(
        len(count), np.full(len(count), 1 / len(count)), size=num_resamples
    )
    return _interval((weights @ sums) / (weights @ count), len(count))


def _interval(means: np.ndarray, n: int) -> tuple[float, float]:
    """The middle 95 % of resampled differences of n items; see `_of_no_spread` where they are all the same."""
    if np.ptp(means) < 1e-9:
        return _of_no_spread(float(means[0]), n)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _of_no_spread(difference: float, n: int) -> tuple[float, float]:
    """Interval of a difference that all n items share (all tie, or one side always wins), which resampling says nothing about:
    Wilson's upper bound of a share of 0 of n on either side, within [-1, 1]."""
    _, width = wilson_interval(0, n)
    return max(-1.0, difference - width), min(1.0, difference + width)


def reliability_curve(
    probs: ArrayLike, truth: ArrayLike, num_bins: int = 10
) -> list[tuple[float, float, tuple[float, float], int]]:
    """(mean stated probability, true rate, its Wilson interval, items) of every equal-width bin that holds items."""
    values, marks = np.asarray(probs, dtype=np.float64), np.asarray(truth, dtype=bool)
    place = np.minimum((values * num_bins).astype(int), num_bins - 1)
    bins = [place == i for i in range(num_bins) if (place == i).any()]
    return [
        (
            float(values[b].mean()),
            float(marks[b].mean()),
            wilson_interval(int(marks[b].sum()), int(b.sum())),
            int(b.sum()),
        )
        for b in bins
    ]


def calibration_error(probs: ArrayLike, truth: ArrayLike, num_bins: int = 10) -> float:
    """Expected calibration error: mean gap of stated probability and true rate over equal-width bins, weighted by size.

    Source: Naeini, Cooper, Hauskrecht 2015.
    """
    values, marks = np.asarray(probs, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    place = np.minimum((values * num_bins).astype(int), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    gaps = np.abs(
        np.bincount(place, weights=values, minlength=num_bins) - np.bincount(place, weights=marks, minlength=num_bins)
    )
    return float(gaps.sum() / max(count.sum(), 1))


def _by_seed(values: ArrayLike) -> np.ndarray:
    """[N] or [S, N] -> float [S, N]; ValueError when there is nothing in it."""
    array = np.asarray(values, dtype=np.float64)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"values must be non-empty, one row of numbers or one row per seed; got shape {array.shape}.")
    return array


def _paired_interval(
    ours: np.ndarray, theirs: np.ndarray, seed: int, num_resamples: int = 10000
) -> tuple[float, float]:
    """95 % interval of the difference: the same problems for both sides, seeds of its own for each."""
    rng = np.random.default_rng(seed)
    if len(ours) == len(theirs) == 1:
        means = _resampled_means(ours - theirs, num_resamples, rng)
    else:
        n = ours.shape[1]
        chunk = max(1, _CHUNK_VALUES // n)
        parts = []
        for start in range(0, num_resamples, chunk):
            count = min(chunk, num_resamples - start)
            weights = rng.multinomial(n, np.full(n, 1 / n), size=count) / n  # [count, N]
            parts.append(_seeds_drawn(weights @ ours.T, rng) - _seeds_drawn(weights @ theirs.T, rng))
        means = np.concatenate(parts)
    return _interval(means, ours.shape[1])


def _seeds_drawn(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean over seeds drawn with replacement, for every resample; [count, S] -> [count]."""
    count, num_seeds = means.shape
    drawn = rng.integers(0, num_seeds, (count, num_seeds))
    return np.take_along_axis(means, drawn, axis=1).mean(axis=1)


def _resampled_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `num_resamples` resamples with replacement of problems and of seeds; [S, N] -> [num_resamples]."""
    num_seeds, n = values.shape
    chunk = max(1, _CHUNK_VALUES // n)
    means = []
    for start in range(0, num_resamples, chunk):
        count = min(chunk, num_resamples - start)
        if num_seeds == 1:
            means.append(values[0][rng.integers(0, n, (count, n))].mean(axis=1))
        else:
            weights = rng.multinomial(n, np.full(n, 1 / n), size=count) / n
            means.append(_seeds_drawn(weights @ values.T, rng))
    return np.concatenate(means)
