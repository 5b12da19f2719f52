"""Gradient-norm attack: a model that was trained on a record has nothing left to learn from it."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.privacy import ATTACKED, attacked, gradient_norms
from alkn.core.probe import Probe
from alkn.errors import InputError
from alkn.membership import MembershipParams
from alkn.registry import register_metric


@register_metric("gradient_norm", params=MembershipParams, source="Wang et al. 2024; OpenUnlearning", sets=ATTACKED)
def gradient_norm(probe: Probe, params: MembershipParams) -> Measured:
    """−‖gradient of the record's mean NLL‖₂, ≤ 0; part ``auc``. A backward pass a record: off by default."""
    return attacked(probe, "gradient_norm", scores, **params.model_dump())


def scores(probe: Probe) -> Measured:
    """Of each record."""
    try:
        return Measured.mean(probe.records.ids, gradient_norms(probe.model, probe.records.examples))
    except InputError as error:
        return Measured.missing(str(error))
