"""What a metric returns: a value or the reason why there is none, and the values a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """One metric on one set.

    Attributes:
        value: the set's value, finite, or ``None``.
        reason: why there is no value; empty when there is one.
        per_record: record number -> value.
        parts: further values under names of their own: an interval's ends, the level it is held against.
    """

    value: float | None
    reason: str = ""
    per_record: Mapping[int, float] = field(default_factory=dict)
    parts: Mapping[str, Measured] = field(default_factory=dict)

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

    def with_parts(self, **parts: Measured | float) -> Measured:
        """The same with further values beside it; a plain number must be finite."""
        more = {name: part if isinstance(part, Measured) else Measured(float(part)) for name, part in parts.items()}
        return replace(self, parts={**self.parts, **more})

    def percentile(self, q: float) -> float:
        """The q-th percentile of the records' values, linear between order statistics, q in [0, 100]."""
        values = torch.tensor(list(self.per_record.values()), dtype=torch.float64)
        return float(torch.quantile(values, q / 100))
