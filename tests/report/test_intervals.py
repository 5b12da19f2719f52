"""The interval of a mean, against scipy's bootstrap and against the normal one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from alkn.report.intervals import bootstrap, interval_of


def test_it_agrees_with_scipy() -> None:
    sample = np.random.default_rng(3).beta(1, 4, 40)
    low, high = bootstrap(sample)
    theirs = stats.bootstrap(
        (sample,), np.mean, confidence_level=0.95, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.06 * width)
    assert high == pytest.approx(theirs.high, abs=0.06 * width)


def test_of_a_large_sample_it_is_the_normal_one() -> None:
    sample = np.random.default_rng(1).normal(0.5, 0.1, 5000)
    half = 1.959964 * sample.std() / math.sqrt(len(sample))
    low, high = bootstrap(sample)
    assert (low, high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.08 * half)


def test_the_same_records_give_the_same_interval() -> None:
    assert bootstrap([0.1, 0.4, 0.2]) == bootstrap([0.1, 0.4, 0.2])
    assert bootstrap([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize(
    ("value", "records", "said"),
    [
        (0.5, {"0": 0.5, "1": 0.5}, "fewer than 3 records have a value"),
        (0.9, {"0": 0.1, "1": 0.2, "2": 0.3}, "the value is not the mean of its records' values"),
    ],
)
def test_where_there_is_none_it_says_why(value: float, records: dict[str, float], said: str) -> None:
    assert interval_of(value, records) == said
    assert interval_of(0.2, {"0": 0.1, "1": 0.2, "2": 0.3}) == bootstrap([0.1, 0.2, 0.3])
