"""What a metric returns: a value or the reason why there is none, and the values a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """One metric on one set.

    Attributes:
        value: the set's value, finite, or ``None``.
        reason: why there is no value; empty when there is one.
        per_record: record number -> value.
    """

    value: float | None
    reason: str = ""
    per_record: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def missing(cls, reason: str) -> Measured:
        """No value, and why."""
        return cls(None, reason)

    @classmethod
    def mean(cls, ids: Sequence[int], values: Tensor | Sequence[float]) -> Measured:
        """The mean over records; examples of one record are averaged first. A value that is not finite is a reason."""
        numbers = torch.as_tensor(values, dtype=torch.float64).tolist()
        groups: dict[int, list[float]] = {}
        for number, value in zip(ids, numbers, strict=True):
            groups.setdefault(number, []).append(value)
        if not all(map(math.isfinite, numbers)):
            return cls.missing("a value is not a finite number")
        per_record = {number: math.fsum(group) / len(group) for number, group in groups.items()}
        return cls(math.fsum(per_record.values()) / len(per_record), "", per_record)

    def percentile(self, q: float) -> float:
        """The q-th percentile of the records' values, linear between order statistics, q in [0, 100]."""
        values = torch.tensor(list(self.per_record.values()), dtype=torch.float64)
        return float(torch.quantile(values, q / 100))
