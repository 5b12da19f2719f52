"""What an attack is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from alkn.core.scoring import Example, Progress, Scores, no_progress
from alkn.core.unlearning import Forgetting


@dataclass(frozen=True)
class Target:
    """What is attacked. An attack works on copies: ``model`` is the same afterwards, to the byte.

    Attributes:
        model: a transformers causal language model on its device, at the precision it is stored in.
        forgotten: request id -> its encoded records.
        utility: set name -> encoded records that should still be known.
        progress: told about long work.
    """

    model: nn.Module
    forgotten: Mapping[str, Sequence[Example]]
    utility: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    progress: Progress = no_progress


@dataclass(frozen=True)
class Point:
    """What is known once so much of the budget is spent.

    Attributes:
        at: what was spent, in the curve's unit.
        known: P and exact memorization, means over all records that are measured.
        requests: request id -> the same of its own records.
        utility: set name -> mean P, where the attack measures it.
    """

    at: int
    known: Forgetting
    requests: Mapping[str, Forgetting]
    utility: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, at: int, scores: Scores, owners: Sequence[str], utility: Mapping[str, float] | None = None) -> Point:
        """From the scores of records and the request that each belongs to."""
        p, hits = scores.probability, scores.exact_memorization
        of: dict[str, list[int]] = {}
        for i, owner in enumerate(owners):
            of.setdefault(owner, []).append(i)
        own = {name: Forgetting(float(p[rows].mean()), float(hits[rows].mean())) for name, rows in of.items()}
        return cls(at, Forgetting.of(scores), own, utility or {})


@dataclass(frozen=True)
class Curve:
    """What comes back against what is spent.

    Attributes:
        unit: what ``Point.at`` counts: ``steps``, or ``bits`` of a weight.
        points: from nothing spent on.
        budget: what the attack was allowed, numbers by name.
        missing: request id -> why it is not measured.
    """

    unit: str
    points: tuple[Point, ...]
    budget: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a report: no text, no record."""
        points = []
        for point in self.points:
            row: dict[str, Any] = {"at": point.at, **numbers_of(point.known)}
            row["requests"] = {name: numbers_of(known) for name, known in point.requests.items()}
            if point.utility:
                row["utility"] = dict(point.utility)
            points.append(row)
        return {"unit": self.unit, "points": points, "budget": dict(self.budget), "missing": dict(self.missing)}


def numbered(forgotten: Mapping[str, Sequence[Example]]) -> tuple[list[str], list[Example]]:
    """The records of all requests in one row, and the request of each."""
    owners = [name for name, examples in forgotten.items() for _ in examples]
    return owners, [example for examples in forgotten.values() for example in examples]


def numbers_of(known: Forgetting) -> dict[str, float]:
    """The two numbers under the names that evaluations use."""
    return {"probability": known.p, "exact_memorization": known.exact_memorization}
