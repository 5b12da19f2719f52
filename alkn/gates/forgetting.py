"""This request is forgotten."""

from __future__ import annotations

from pydantic import Field

from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import register_gate


class ForgettingParams(GateParams):
    """``p95``: limit of the 95th percentile of the records' P, as a multiple of the target of the mean."""

    p95: float = Field(5.0, gt=0)


@register_gate("forgetting", params=ForgettingParams, source="own; both numbers for the reason in METHOD.md")
def forgetting(evidence: Evidence, params: ForgettingParams) -> Verdict:
    """P (mean and 95th percentile) and exact memorization of the forget records are at their targets."""
    limits = evidence.limits
    return Verdict.of(
        [
            Check.at_most("P, mean", evidence.value("step", "forget", "probability"), limits.p),
            Check.at_most(
                "P, 95th percentile",
                evidence.value("step", "forget", "probability_p95"),
                min(1.0, limits.p * params.p95),
            ),
            Check.at_most(
                "exact memorization",
                evidence.value("step", "forget", "exact_memorization"),
                limits.exact_memorization,
            ),
        ]
    )
