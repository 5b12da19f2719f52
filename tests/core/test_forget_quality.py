"""The Kolmogorov-Smirnov test: by hand, by counting, and against scipy's own defaults."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from alkn.core.forget_quality import EXACT_UP_TO, KolmogorovSmirnov, ks_test


def distance(a: list[float], b: list[float]) -> float:
    return max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in (*a, *b))


def test_by_hand() -> None:
    """At t = 3 all of a and a quarter of b are below: the distance is 3/4."""
    found = ks_test([1.0, 2.0, 3.0], [2.5, 3.5, 4.5, 5.0])
    assert found.statistic == pytest.approx(0.75)
    assert found.sizes == (3, 4) and found.mode == "exact"


def test_the_p_value_by_counting_every_arrangement() -> None:
    """Under the null hypothesis every split of the seven values into 3 and 4 is equally likely."""
    a, b = [1.0, 2.0, 3.0], [2.5, 3.5, 4.5, 5.0]
    pool, observed = a + b, distance(a, b)
    splits = list(itertools.combinations(range(7), 3))
    as_far = sum(
        distance([pool[i] for i in pick], [pool[i] for i in range(7) if i not in pick]) >= observed - 1e-12
        for pick in splits
    )
    assert ks_test(a, b).p_value == pytest.approx(as_far / len(splits))


def test_as_tofu_calls_it() -> None:
    """scipy with its defaults, on samples of TOFU's size; also on the reciprocal, since only ranks count."""
    random = np.random.default_rng(0)
    a, b = random.lognormal(0.0, 1.0, 80), random.lognormal(0.4, 1.0, 80)
    expected = ks_2samp(a, b)
    found = ks_test(a.tolist(), b.tolist())
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.statistic == pytest.approx(expected.statistic)
    assert ks_test((1 / a).tolist(), (1 / b).tolist()).p_value == pytest.approx(expected.pvalue)
    assert found.log10_p == pytest.approx(math.log10(expected.pvalue))


def test_large_samples_use_the_limit_and_say_so() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(0, 1, EXACT_UP_TO + 1), random.normal(0.02, 1, 500)
    found = ks_test(a.tolist(), b.tolist())
    assert found.mode == "asymptotic"
    assert found.p_value == pytest.approx(ks_2samp(a, b, method="asymp").pvalue)
    assert found.p_value != pytest.approx(ks_2samp(a, b, method="exact").pvalue, rel=1e-6)


def test_the_logarithm_of_a_vanished_p_value_is_finite() -> None:
    assert KolmogorovSmirnov(1.0, 0.0, (9, 9), "exact").log10_p == pytest.approx(-307.65, abs=0.01)


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")]])
def test_what_is_no_sample_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers, none empty"):
        ks_test(bad, [1.0])
    with pytest.raises(ValueError, match="finite numbers, none empty"):
        ks_test([1.0], bad)
