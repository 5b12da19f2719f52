"""The method met its own stop rule."""

from __future__ import annotations

from alkn.evidence import Check, Evidence, GateParams, Verdict
from alkn.registry import register_gate


@register_gate("target_reached", params=GateParams, source="METHOD.md: not done after the last round is rejected")
def target_reached(evidence: Evidence, params: GateParams) -> Verdict:
    """Unlearning ended because the target was reached, not because its rounds were used up."""
    return Verdict.of([Check.at_least("stop rule met", float(evidence.reached), 1.0)])
