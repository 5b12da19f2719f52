"""Reference-model attack: more probable than to a model that never saw it."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.privacy import NO_HOLDOUT, log_likelihoods, separation
from alkn.core.probe import Probe
from alkn.membership import MembershipParams
from alkn.registry import register_metric


@register_metric(
    "reference_loss",
    params=MembershipParams,
    source="Carlini et al. 2021, section 5.1; Mireshghallah et al. 2022",
    sets=("forget", "earlier"),
)
def reference_loss(probe: Probe, params: MembershipParams) -> Measured:
    """(log π(answer) − log π_reference(answer)) / tokens, nats a token; part ``auc``: members against the holdout."""
    reference = probe.references.first
    if reference is None:
        return Measured.missing(probe.references.reason)
    own = _scores(probe, reference)
    if own.value is None:
        return own
    if probe.holdout is None or reference.holdout is None:
        return own.with_parts(auc=Measured.missing(NO_HOLDOUT))
    others = _scores(probe.holdout, reference.holdout)
    if others.value is None:
        return own.with_parts(auc=Measured.missing(f"holdout: {others.reason}"))
    found = separation(own.per_record, others.per_record, **params.model_dump())
    return own.with_parts(auc=found.auc, auc_low=found.low, auc_high=found.high)


def _scores(probe: Probe, reference: Probe) -> Measured:
    """Totals over a record's text are compared, since the two may cut it into other tokens."""
    own, theirs = log_likelihoods(probe), log_likelihoods(reference)
    return Measured.mean(list(own), [(total - theirs[number][0]) / tokens for number, (total, tokens) in own.items()])
