"""A sample of records instead of all of them, and how far its mean may be from theirs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

LARGEST_BET = 0.75
"""Share of the capital that is at stake at the most, so that one surprise does not lose it all."""


def pick(count: int, size: int, *, seed: int) -> list[int]:
    """``size`` of ``count`` positions in random order, each set and order as likely; all in order if size ≥ count."""
    if size >= count:
        return list(range(count))
    return torch.randperm(count, generator=Generator().manual_seed(seed))[:size].tolist()


def sample_of(digest: str, numbers: Sequence[int], size: int | None) -> list[int]:
    """The records that stand for all of a request, in the order in which they are drawn; the same ones each time.

    Args:
        digest: of the request's file, keyed: who has not the key cannot tell which records will be drawn.
        numbers: all record numbers, in the file's order.
        size: how many; ``None``: all.
    """
    seed = int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "big") >> 1
    return [numbers[i] for i in pick(len(numbers), len(numbers) if size is None else size, seed=seed)]


def mean_interval(values: Sequence[float], total: int, *, confidence: float) -> tuple[float, float]:
    """Bounds that hold the mean of a finite population with at least the given probability.

    Nothing is assumed of the population but its range and size. For every mean m that it may have, a gambler
    bets on each drawn value against what m leaves for the values not yet drawn; under the true mean nobody's
    expected capital grows, so by Markov's inequality the mean at which it grew 2 / (1 − confidence)-fold is
    refused. A bet is larger the less the values varied so far, which makes the bounds of values that are nearly
    alike much narrower than Hoeffding's.

    Args:
        values: the sample, drawn without replacement, in the order in which it was drawn, each in [0, 1].
        total: size of the population, at least the sample's.
        confidence: in (0, 1), two-sided.

    Returns:
        Lower and upper bound; both the mean itself if the sample is the population.

    Source: Waudby-Smith and Ramdas 2024 (arXiv 2010.09686), Estimating means of bounded random variables by
        betting: its section on sampling without replacement, with the bets it gives for a fixed sample size.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    n = x.numel()
    if n == 0 or n > total or bool(((x < 0) | (x > 1)).any()):
        raise ValueError(f"expected 1 to {total} values in [0, 1], found {n}")
    if n == total:
        mean = math.fsum(x.tolist()) / n
        return mean, mean
    before = torch.cat([x.new_zeros(1), x.cumsum(0)[:-1]])
    left = total - torch.arange(n, dtype=torch.float64)
    bets = _bets(x, before, 1 - confidence)
    limit = math.log(2 / (1 - confidence))

    def capital(mean: float, sign: int) -> float:
        """Logarithm of what a gambler has who holds the mean to be above (+1) or below (−1) ``mean``."""
        rest = ((total * mean - before) / left).clamp(0, 1)
        room = rest if sign > 0 else 1 - rest
        stakes = torch.minimum(bets, LARGEST_BET / room.clamp_min(1e-300))
        return float(torch.log1p(sign * stakes * (x - rest)).sum())

    # What was not drawn is in [0, 1] too.
    least, most = float(x.sum()) / total, (float(x.sum()) + total - n) / total
    middle = min(max(float(x.mean()), least), most)
    low = _edge(lambda m: capital(m, 1) < limit, least, middle)
    high = _edge(lambda m: capital(m, -1) < limit, most, middle)
    return low, high


def _bets(x: Tensor, before: Tensor, alpha: float) -> Tensor:
    """What is bet on each value, knowing those before it only: sqrt(2 log(2/α) / (n · variance so far))."""
    n = x.numel()
    drawn = torch.arange(1, n + 1, dtype=torch.float64)
    means = (0.5 + x.cumsum(0)) / (drawn + 1)
    variances = (0.25 + ((x - means) ** 2).cumsum(0)) / (drawn + 1)
    so_far = torch.cat([x.new_tensor([0.25]), variances[:-1]])
    return torch.sqrt(2 * math.log(2 / alpha) / (n * so_far))


def _edge(held: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where ``held`` becomes true between ``outside`` and ``inside``, rounded outwards."""
    if held(outside):
        return outside
    for _ in range(32):
        middle = (outside + inside) / 2
        outside, inside = (outside, middle) if held(middle) else (middle, inside)
    return outside
