"""Every number is finite."""

from __future__ import annotations

from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import register_gate


@register_gate("finite", params=GateParams, source="own")
def finite(evidence: Evidence, params: GateParams) -> Verdict:
    """Every weight of the stored model is finite, and P could be computed on every set."""
    checks = [Check.at_least("finite weights", float(evidence.finite_weights), 1.0)]
    for name in evidence.sets(""):
        present = evidence.value("step", name, "probability") is not None
        checks.append(Check.at_least(f"P of {name} computed", float(present), 1.0))
    return Verdict.of(checks)
