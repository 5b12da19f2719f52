"""The model is still useful."""

from __future__ import annotations

from pydantic import Field

from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import register_gate


class UtilityParams(GateParams):
    """Smallest share of P that every utility domain keeps, against ``base`` and against ``parent``."""

    base: float = Field(0.3, ge=0, le=1)
    parent: float = Field(0.6, ge=0, le=1)


@register_gate("utility", params=UtilityParams, source="own; relative form of TOFU's retained utility")
def utility(evidence: Evidence, params: UtilityParams) -> Verdict:
    """P on records that were never drawn on, domain by domain, relative to base and parent.

    A domain that either of them has and the step has not fails.
    """
    domains = evidence.sets("utility/", of=("step", "parent", "base"))
    if not domains:
        return Verdict.lacking("utility set", params)
    checks = []
    for name in domains:
        now = evidence.value("step", name, "probability")
        for where, limit in (("base", params.base), ("parent", params.parent)):
            before = evidence.value(where, name, "probability")
            kept = now / before if now is not None and before else None
            checks.append(Check.at_least(f"{name.split('/', 1)[1]} kept of {where}", kept, limit))
    return Verdict.of(checks)
