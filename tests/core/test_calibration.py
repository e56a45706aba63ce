"""From readings to a threshold and the trigger rate to expect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t.core.calibration import threshold_at
from s2t.errors import DataError

readings = st.lists(st.floats(0, 30), min_size=1, max_size=200).map(np.array)
quantiles = st.floats(0, 1)


@given(values=readings, quantile=quantiles)
def test_the_rate_is_the_share_above_the_threshold_and_at_most_what_was_asked(values, quantile):
    threshold, rate = threshold_at(values, quantile)
    assert threshold in values
    assert rate == (values > threshold).mean()
    assert rate <= 1 - quantile + 1e-9


@given(values=readings, pair=st.tuples(quantiles, quantiles))
def test_a_higher_quantile_never_triggers_more(values, pair):
    low, high = (threshold_at(values, quantile) for quantile in sorted(pair))
    assert low[0] <= high[0]
    assert low[1] >= high[1]


@given(values=readings)
def test_quantile_one_never_triggers(values):
    assert threshold_at(values, 1.0) == (values.max(), 0.0)


@given(value=st.floats(0, 30), count=st.integers(1, 50), quantile=quantiles)
def test_equal_readings_never_trigger(value, count, quantile):
    assert threshold_at(np.full(count, value), quantile) == (value, 0.0)


def test_the_0_95_quantile_triggers_at_five_per_cent():
    threshold, rate = threshold_at(np.random.default_rng(0).exponential(size=10_000), 0.95)
    assert rate == pytest.approx(0.05, abs=1e-3)
    assert threshold == pytest.approx(-np.log(0.05), abs=0.15)


def test_the_threshold_of_float32_readings_is_compared_in_their_own_values():
    values = np.random.default_rng(0).random(1000).astype(np.float32)
    threshold, rate = threshold_at(values, 0.9)
    assert (values > np.float32(threshold)).mean() == rate


def test_nothing_to_calibrate_on_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match="--limit"):
        threshold_at(np.array([]), 0.95)
