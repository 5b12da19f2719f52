"""LOSS attack: what was trained on is more probable."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.privacy import ATTACKED, attacked
from alkn.core.probe import Probe
from alkn.membership import MembershipParams
from alkn.registry import register_metric


@register_metric("loss", params=MembershipParams, source="Yeom et al. 2018", sets=ATTACKED)
def loss(probe: Probe, params: MembershipParams) -> Measured:
    """Mean log-probability of the answer's tokens, nats, ≤ 0; part ``auc``: members against the holdout."""
    return attacked(probe, "loss", scores, **params.model_dump())


def scores(probe: Probe) -> Measured:
    """Of each record."""
    return Measured.mean(probe.records.ids, -probe.scores.nll)
