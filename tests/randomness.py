"""Random numbers that are the same in every run."""

from __future__ import annotations

from torch import Generator


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)
