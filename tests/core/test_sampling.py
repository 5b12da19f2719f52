"""Samples of records: the interval covers what it says, against a slow second way and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alkn.core.sampling import LARGEST_BET, mean_interval, pick


def test_a_pick_is_a_set_of_positions_and_the_same_again() -> None:
    chosen = pick(50, 12, seed=3)
    assert len(set(chosen)) == 12 and set(chosen) <= set(range(50))
    assert pick(50, 12, seed=3) == chosen != pick(50, 12, seed=4)
    assert pick(5, 5, seed=1) == pick(5, 9, seed=1) == [0, 1, 2, 3, 4]


def test_every_position_is_as_likely() -> None:
    counts = np.bincount([i for seed in range(3000) for i in pick(10, 3, seed=seed)], minlength=10)
    assert abs(counts - 900).max() < 5 * math.sqrt(3000 * 0.3 * 0.7)


def by_hand(values: list[float], total: int, confidence: float) -> tuple[float, float]:
    """The means on a grid at which neither gambler is rich, value by value as the paper tells it."""
    n, alpha, kept = len(values), 1 - confidence, []
    for m in np.linspace(0, 1, 2001):
        if not math.fsum(values) <= total * m + 1e-12 <= math.fsum(values) + total - n + 2e-12:
            continue
        up = down = 1.0
        drawn: list[float] = []
        squares = 0.25
        for x in values:
            rest = (total * m - sum(drawn)) / (total - len(drawn))
            bet = math.sqrt(2 * math.log(2 / alpha) / (n * squares / (len(drawn) + 1)))
            up *= 1 + min(bet, LARGEST_BET / rest if rest > 0 else math.inf) * (x - rest)
            down *= 1 - min(bet, LARGEST_BET / (1 - rest) if rest < 1 else math.inf) * (x - rest)
            drawn.append(x)
            squares += (x - (0.5 + sum(drawn)) / (len(drawn) + 1)) ** 2
        if max(up, down) < 2 / alpha:
            kept.append(float(m))
    return kept[0], kept[-1]


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (0.0, 0.05), (0.4, 0.6)])
def test_the_interval_against_a_slow_second_way(low_high: tuple[float, float]) -> None:
    values = np.random.default_rng(1).uniform(*low_high, size=24).tolist()
    expected = by_hand(values, 90, 0.9)
    assert mean_interval(values, 90, confidence=0.9) == pytest.approx(expected, abs=6e-4)


POPULATIONS = {
    "forgotten, one record stayed": lambda r: np.append(r.beta(0.3, 30, 119), 0.97),
    "two kinds": lambda r: (r.random(120) < 0.2).astype(float),
    "even": lambda r: r.random(120),
    "known": lambda r: 1 - r.beta(0.5, 20, 120),
    "all the same": lambda r: np.full(120, 0.01),
}


@pytest.mark.parametrize(("name", "size"), zip(POPULATIONS, (60, 16, 60, 30, 16), strict=True))
def test_coverage_by_simulation(name: str, size: int) -> None:
    """The share of samples whose interval holds the mean is at least the confidence, less four standard errors."""
    random, confidence, trials = np.random.default_rng(7), 0.9, 150
    population = POPULATIONS[name](random)
    held = 0
    for seed in range(trials):
        low, high = mean_interval(population[pick(120, size, seed=seed)].tolist(), 120, confidence=confidence)
        held += low - 1e-12 <= population.mean() <= high + 1e-12
    assert held / trials >= confidence - 4 * math.sqrt(confidence * (1 - confidence) / trials)


def test_it_is_narrower_than_hoeffding_where_values_are_alike() -> None:
    values = np.random.default_rng(0).beta(0.3, 30, 64).tolist()
    low, high = mean_interval(values, 400, confidence=0.95)
    serfling = math.sqrt((1 - 63 / 400) * math.log(2 / 0.05) / (2 * 64))
    assert 0 <= low < np.mean(values) < high < np.mean(values) + serfling / 2


def test_a_whole_population_has_no_error() -> None:
    assert mean_interval([0.25, 0.5], 2, confidence=0.95) == (0.375, 0.375)


def test_what_was_not_drawn_is_between_0_and_1() -> None:
    low, high = mean_interval([1.0] * 9, 10, confidence=0.95)
    assert low >= 0.9 and high == 1.0


@pytest.mark.parametrize("values", [[], [0.5, 1.2], [0.1] * 4])
def test_impossible_samples(values: list[float]) -> None:
    with pytest.raises(ValueError, match="1 to 3 values"):
        mean_interval(torch.tensor(values).tolist(), 3, confidence=0.9)
