"""Numbers that go with a score: intervals, paired tests and the hit-rate curve.

Pure numpy on arrays of per-problem or per-step values; knows no models and no files. Every resampling takes
a seed and is a function of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, num_resamples: int = 10000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling problems; [N] -> (low, high).

    ValueError when there are no values.
    """
    array = np.asarray(values, dtype=np.float64)  # [N]
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values must be one non-empty row of numbers; got shape {array.shape}.")
    means = _resampled_means(array, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_comparison(left: ArrayLike, right: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Compare two systems on the same problems; two bool [N] -> difference, ci95, p_value, wins, losses.

    `difference` is the left accuracy minus the right one with a paired bootstrap interval; a win is a
    problem only the left one solves; `p_value` is the exact two-sided McNemar test. ValueError when the
    rows differ in length or are empty.
    """
    ours, theirs = np.asarray(left, dtype=bool), np.asarray(right, dtype=bool)  # [N], [N]
    if ours.shape != theirs.shape:
        raise ValueError(f"both systems must have the same problems; got {ours.shape} and {theirs.shape}.")
    gains = ours.astype(np.float64) - theirs.astype(np.float64)  # [N]
    interval = bootstrap_interval(gains, seed=seed)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    return {
        "difference": (wins - losses) / gains.size,
        "ci95": interval,
        "p_value": mcnemar_p_value(wins, losses),
        "wins": wins,
        "losses": losses,
    }


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Exact two-sided McNemar test: chance of a split at least this uneven among the discordant problems."""
    n, tail, term = wins + losses, 0, 1
    for index in range(min(wins, losses) + 1):
        tail += term
        term = term * (n - index) // (index + 1)  # C(n, index + 1), exact
    return min(1.0, 2 * tail / 2**n)


def hit_rate_curve(ranks: ArrayLike, ks: Iterable[int]) -> dict[int, float]:
    """Share of steps whose LLM token is among the first k SLM tokens; int [N] (0 = top) -> {k: rate}.

    Grows with k. Every rate is nan when there are no steps: nothing was measured.
    """
    array = np.asarray(ranks)  # [N]
    return {k: float((array < k).mean()) if array.size else math.nan for k in ks}


def _resampled_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `num_resamples` resamples with replacement, chunk by chunk; [N] -> [num_resamples]."""
    chunk = max(1, _CHUNK_VALUES // values.size)
    means = [
        values[rng.integers(0, values.size, (min(chunk, num_resamples - start), values.size))].mean(axis=1)
        for start in range(0, num_resamples, chunk)
    ]
    return np.concatenate(means)
