"""How far a mean over records may be off, from the spread of the records.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
FEWEST = 3
CELLS = 2**22
"""Numbers drawn at a time, so that a large set needs no more memory than a small one."""
METHOD = (
    f"percentile bootstrap over records, {CONFIDENCE:.0%}, {RESAMPLES} resamples: the spread between records, not"
    " between trainings; of an AUC the one that comes with it (docs/METRICS.md)"
)


def bootstrap(values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean.

    Args:
        values: one a record, ``[records]``.
        confidence: share of resampled means inside, in (0, 1).
        seed: of the resampling.

    Returns:
        The lower and the upper bound, in the unit of the values.
    """
    sample, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means: list[np.ndarray] = []
    left = RESAMPLES
    while left:
        count = max(1, min(left, CELLS // len(sample)))
        means.append(sample[generator.integers(0, len(sample), (count, len(sample)))].mean(axis=1))
        left -= count
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)


def interval_of(value: float, per_record: Mapping[str, float | None]) -> tuple[float, float] | str:
    """The interval of a metric's value, or why there is none.

    Args:
        value: of the whole set.
        per_record: record number -> its own value.
    """
    values = [number for number in per_record.values() if number is not None]
    if len(values) < FEWEST:
        return f"fewer than {FEWEST} records have a value"
    if not math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9):
        return "the value is not the mean of its records' values"
    return bootstrap(values)
