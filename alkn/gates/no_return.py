"""Nothing that was forgotten has come back."""

from __future__ import annotations

from pydantic import Field

from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import register_gate


class NoReturnParams(GateParams):
    """``slack``: how far above its own target an earlier request may drift, as a factor."""

    slack: float = Field(1.0, ge=1)


@register_gate("no_return", params=NoReturnParams, source="own")
def no_return(evidence: Evidence, params: NoReturnParams) -> Verdict:
    """Every earlier request is still at the targets."""
    earlier = evidence.sets("earlier/")
    if not earlier:
        return Verdict(None, (), "there is no earlier request")
    limits, slack = evidence.limits, params.slack
    checks = []
    for name in earlier:
        request = name.split("/", 1)[1]
        p, em = (evidence.value("step", name, metric) for metric in ("probability", "exact_memorization"))
        checks.append(Check.at_most(f"P of {request}", p, min(1.0, limits.p * slack)))
        checks.append(
            Check.at_most(f"exact memorization of {request}", em, min(1.0, limits.exact_memorization * slack))
        )
    return Verdict.of(checks)
