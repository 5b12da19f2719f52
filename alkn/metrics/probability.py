"""P: how probable the right answer is."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.probe import Probe
from alkn.registry import Params, register_metric


@register_metric("probability", source="TOFU (Maini et al. 2024), section 2.2.1")
def probability(probe: Probe, params: Params) -> Measured:
    """exp(−mean over answer tokens, end-of-sequence included, of −log π); in [0, 1]."""
    return Measured.mean(probe.records.ids, probe.scores.probability)
