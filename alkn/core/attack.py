"""What an attack is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from alkn.core.asked import Asked
from alkn.core.scoring import Example, Progress, Scores, no_progress, score
from alkn.core.unlearning import Forgetting
from alkn.errors import InputError


def _nothing(_of: Any) -> Any:
    raise InputError("the attack needs the records' text or the project's files, and was not given them")


@dataclass(frozen=True)
class Target:
    """What is attacked. An attack works on copies: ``model`` is the same afterwards, to the byte.

    Attributes:
        model: a transformers causal language model on its device, at the precision it is stored in.
        forgotten: request id -> its encoded records.
        utility: set name -> encoded records that should still be known.
        progress: told about long work.
        asked: request -> its records as text, in the order of ``forgotten``; ``None``: one without a question.
        related: other text by name (``retain``, ``utility``, ``holdout`` or a file), encoded.
        load: a model from a user's folder, and the bits of its weights.
        decode: text of generated token ids.
        eos: end-of-sequence id.
    """

    model: nn.Module
    forgotten: Mapping[str, Sequence[Example]]
    utility: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    progress: Progress = no_progress
    asked: Mapping[str, Sequence[Asked | None]] = field(default_factory=dict, repr=False)
    related: Callable[[str], Sequence[Example]] = _nothing
    load: Callable[[str], tuple[nn.Module, int]] = _nothing
    decode: Callable[[list[int]], str] = _nothing
    eos: int | None = None


@dataclass(frozen=True)
class Point:
    """What is known once so much of the budget is spent.

    Attributes:
        at: what was spent, in the curve's unit.
        known: P and exact memorization, means over all records that are measured.
        requests: request id -> the same of its own records.
        utility: set name -> mean P, where the attack measures it.
        more: further numbers of all records, by name.
        requests_more: request id -> the same of its own records.
    """

    at: int
    known: Forgetting
    requests: Mapping[str, Forgetting]
    utility: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, float] = field(default_factory=dict)
    requests_more: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, at: int, scores: Scores, owners: Sequence[str], utility: Mapping[str, float] | None = None) -> Point:
        """From the scores of records and the request that each belongs to."""
        return cls.of_values(at, scores.probability, scores.exact_memorization, owners, utility=utility)

    @classmethod
    def of_values(
        cls,
        at: int,
        p: Tensor,
        hits: Tensor,
        owners: Sequence[str],
        *,
        utility: Mapping[str, float] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> Point:
        """From P, exact memorization and further numbers of records, ``[records]`` each, and the request of each."""
        of: dict[str, list[int]] = {}
        for i, owner in enumerate(owners):
            of.setdefault(owner, []).append(i)
        further = more or {}
        return cls(
            at,
            Forgetting(float(p.mean()), float(hits.mean())),
            {name: Forgetting(float(p[rows].mean()), float(hits[rows].mean())) for name, rows in of.items()},
            utility or {},
            {metric: float(values.mean()) for metric, values in further.items()},
            {name: {metric: float(v[rows].mean()) for metric, v in further.items()} for name, rows in of.items()},
        )


@dataclass(frozen=True)
class Curve:
    """What comes back against what is spent.

    Attributes:
        unit: what ``Point.at`` counts: ``steps``, ``bits`` of a weight, ``tokens``, ``samples`` and the like.
        points: from nothing spent on.
        budget: what the attack was allowed, numbers by name.
        missing: request id -> why it is not measured.
        about: the numbers of a point that the attack moves, first the one to look at.
    """

    unit: str
    points: tuple[Point, ...]
    budget: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)
    about: tuple[str, ...] = ("probability", "exact_memorization")

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a report: no text, no record."""
        points = []
        for point in self.points:
            row: dict[str, Any] = {"at": point.at, **numbers_of(point.known), **point.more}
            row["requests"] = {
                name: {**numbers_of(known), **point.requests_more.get(name, {})}
                for name, known in point.requests.items()
            }
            if point.utility:
                row["utility"] = dict(point.utility)
            points.append(row)
        return {
            "unit": self.unit, "about": list(self.about), "points": points, "budget": dict(self.budget),
            "missing": dict(self.missing),
        }  # fmt: skip


def numbered(forgotten: Mapping[str, Sequence[Example]]) -> tuple[list[str], list[Example]]:
    """The records of all requests in one row, and the request of each."""
    owners = [name for name, examples in forgotten.items() for _ in examples]
    return owners, [example for examples in forgotten.values() for example in examples]


def numbers_of(known: Forgetting) -> dict[str, float]:
    """The two numbers under the names that evaluations use."""
    return {"probability": known.p, "exact_memorization": known.exact_memorization}


def known_at(at: int, target: Target, model: nn.Module) -> Point:
    """What a changed form of the model knows of every request and every utility set."""
    owners, records = numbered(target.forgotten)
    utility = {name: float(score(model, examples).probability.mean()) for name, examples in target.utility.items()}
    return Point.of(at, score(model, records), owners, utility)
