"""What gates judge by, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from alkn.core.unlearning import StopRule
from alkn.registry import Params


class GateParams(Params):
    """``enabled``: ``null`` judges where what the gate needs was given; ``true`` fails without it."""

    enabled: bool | None = Field(None)


@dataclass(frozen=True)
class Check:
    """One number against its limit. ``value`` is ``None`` if it could not be computed: the check fails."""

    what: str
    value: float | None
    limit: float
    passed: bool

    @classmethod
    def at_most(cls, what: str, value: float | None, limit: float) -> Check:
        """Passes if value ≤ limit."""
        return cls(what, value, limit, value is not None and value <= limit)

    @classmethod
    def at_least(cls, what: str, value: float | None, limit: float) -> Check:
        """Passes if value ≥ limit."""
        return cls(what, value, limit, value is not None and value >= limit)


@dataclass(frozen=True)
class Verdict:
    """What one gate says. ``passed`` is ``None`` if it was not asked, and ``reason`` says why."""

    passed: bool | None
    checks: tuple[Check, ...] = ()
    reason: str = ""

    @classmethod
    def of(cls, checks: list[Check]) -> Verdict:
        """All checks must pass, and there must be one."""
        failed = "; ".join(
            f"{c.what} {'could not be computed' if c.value is None else f'{c.value:.4g}'}, limit {c.limit:.4g}"
            for c in checks
            if not c.passed
        )
        return cls(bool(checks) and not failed, tuple(checks), failed or ("" if checks else "nothing to check"))

    @classmethod
    def lacking(cls, what: str, params: GateParams) -> Verdict:
        """The gate needs something that is not there: off, unless it was switched on, then failed."""
        return cls(False if params.enabled else None, (), f"there is no {what}")


@dataclass(frozen=True)
class Evidence:
    """The numbers of a step and what they are held against.

    Attributes:
        step, parent, base: evaluations, see :func:`alkn.evaluation.evaluate_model`.
        attacks: attack -> its curve, see :func:`alkn.attacking.run_attacks`.
        limits: the targets as numbers.
        reached: whether the method met its own stop rule.
        finite_weights: whether every weight of the stored model is a finite number.
    """

    step: Mapping[str, Any]
    parent: Mapping[str, Any]
    base: Mapping[str, Any]
    limits: StopRule
    reached: bool
    finite_weights: bool
    attacks: Mapping[str, Any] = field(default_factory=dict)

    def value(self, where: str, set_name: str, metric: str) -> float | None:
        """A set's value in ``step``, ``parent`` or ``base``."""
        row = getattr(self, where)["sets"].get(set_name, {})
        value = row.get(metric)
        return None if value is None else float(value)

    def sets(self, prefix: str, *, of: Sequence[str] = ("step",)) -> list[str]:
        """The sets of the step, or of ``step``, ``parent`` and ``base``, whose name begins with ``prefix``."""
        names = dict.fromkeys(name for where in of for name in getattr(self, where)["sets"])
        return [name for name in names if name.startswith(prefix)]
