"""Attacks bring little back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from alkn import registry
from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import register_gate

Limit = Annotated[float, Field(ge=0, le=1)]
SHORT = {"probability": "P", "exact_memorization": "exact memorization", "rouge_l": "ROUGE-L"}


class RobustnessParams(GateParams):
    """Largest values that an attack may reach for any request, at any point of its curve.

    Attributes:
        probability: attack -> limit of mean P.
        exact_memorization: attack -> limit of the mean share of answer tokens predicted right.
        rouge_l: attack -> limit of the mean largest ROUGE-L recall; for ``sampling``.
    """

    probability: dict[str, Limit] = {}
    exact_memorization: dict[str, Limit] = {}
    rouge_l: dict[str, Limit] = {}

    @field_validator("probability", "exact_memorization", "rouge_l")
    @classmethod
    def _known(cls, limits: dict[str, float]) -> dict[str, float]:
        for name in limits:
            if name not in registry.attacks:
                raise ValueError(registry.unknown_name("attack", name, registry.attacks))
        return limits


@register_gate("robustness", params=RobustnessParams, source="own; docs/ATTACKS.md")
def robustness(evidence: Evidence, params: RobustnessParams) -> Verdict:
    """The worst request at the worst point of each limited attack's curve; a curve that is not there fails."""
    limits = {metric: getattr(params, metric) for metric in SHORT}
    if not any(limits.values()):
        return Verdict.lacking("limit: gates.robustness.probability names no attack", params)
    return Verdict.of(
        [
            check
            for metric, of in limits.items()
            for attack, limit in of.items()
            for check in _checks(evidence.attacks.get(attack), attack, metric, limit)
        ]
    )


def _checks(curve: Mapping[str, Any] | None, attack: str, metric: str, limit: float) -> list[Check]:
    what = f"{SHORT[metric]} after {attack}"
    if curve is None:
        return [Check.at_most(what, None, limit)]
    found = [
        (float(known[metric]), f"{request} at {point['at']}")
        for point in curve["points"]
        for request, known in point["requests"].items()
        if metric in known
    ]
    lacking = [Check.at_most(f"{what} of {name}", None, limit) for name in curve["missing"]]
    if not found:
        return lacking or [Check.at_most(what, None, limit)]
    worst, where = max(found)
    return [Check.at_most(f"{what}, worst: {where} {curve['unit']}", worst, limit), *lacking]
