"""Quantile to threshold: from readings on the calibration split to a trigger's cut and the rate to expect."""

from __future__ import annotations

import numpy as np

from s2t.errors import DataError


def threshold_at(values: np.ndarray, quantile: float) -> tuple[float, float]:
    """The `quantile` of the readings and the share of readings strictly above it; [N] -> (threshold, trigger_rate).

    Raises DataError when there is nothing to calibrate on.
    Source: Select to Think (arXiv 2604.26940), threshold as a quantile over a calibration set.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise DataError("calibration needs at least one step past the warm-up; got none; raise --limit.")
    threshold = float(np.quantile(values, quantile, method="higher"))
    return threshold, float((values > threshold).mean())
