"""Exact memorization: how much of the answer the model would say token by token."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.probe import Probe
from alkn.registry import Params, register_metric


@register_metric("exact_memorization", source="Tirumala et al. 2022; OpenUnlearning")
def exact_memorization(probe: Probe, params: Params) -> Measured:
    """Share of answer tokens that are the model's first choice under teacher forcing; in [0, 1]."""
    return Measured.mean(probe.records.ids, probe.scores.exact_memorization)
