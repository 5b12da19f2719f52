"""Forget quality: can the model be told from one that was trained without the records?"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EXACT_UP_TO = 10_000
"""Largest sample for which the p-value is exact, as in scipy's ``auto``."""


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """A two-sided two-sample test.

    Attributes:
        statistic: largest distance between the two empirical distribution functions, in [0, 1].
        p_value: probability of such a distance or a larger one if both come from one distribution.
        sizes: of the two samples.
        mode: ``exact`` counts the lattice paths, ``asymptotic`` uses the limit distribution.
    """

    statistic: float
    p_value: float
    sizes: tuple[int, int]
    mode: Literal["exact", "asymptotic"]

    @property
    def log10_p(self) -> float:
        """log10 of the p-value; one below the smallest normal number counts as that, −307.7."""
        return math.log10(max(self.p_value, sys.float_info.min))


def ks_test(a: Sequence[float], b: Sequence[float]) -> KolmogorovSmirnov:
    """Two-sided two-sample Kolmogorov-Smirnov test.

    Exact up to 10,000 values a sample (with ties: conservative), beyond that asymptotic. The test sees ranks only,
    so any rising or falling function of the truth ratio gives the same p-value.

    Args:
        a: finite values, at least one.
        b: finite values, at least one.

    Raises:
        ValueError: if a sample is empty or holds a value that is not finite.

    Source: TOFU (Maini et al. 2024), section 2.2.2, whose code calls ``scipy.stats.ks_2samp`` too.
    """
    for values in (a, b):
        if not len(values) or not all(map(math.isfinite, values)):
            raise ValueError("the Kolmogorov-Smirnov test needs two samples of finite numbers, none empty")
    from scipy.stats import ks_2samp  # seconds to import, and only forget quality needs it

    exact = max(len(a), len(b)) <= EXACT_UP_TO
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # how scipy tells that it gave the exact form up
        try:
            found = ks_2samp(list(a), list(b), alternative="two-sided", method="exact" if exact else "asymp")
        except RuntimeWarning:
            exact = False
            found = ks_2samp(list(a), list(b), alternative="two-sided", method="asymp")
    return KolmogorovSmirnov(
        float(found.statistic), float(found.pvalue), (len(a), len(b)), "exact" if exact else "asymptotic"
    )
