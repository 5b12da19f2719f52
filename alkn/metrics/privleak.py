"""PrivLeak: does the model give away more, or less, than one that never saw the records?"""

from __future__ import annotations

from pydantic import Field

from alkn.core.measured import Measured
from alkn.core.privacy import NO_HOLDOUT, auc, lowest_share
from alkn.core.probe import Probe
from alkn.registry import Params, register_metric


class PrivLeakParams(Params):
    """``share``: of Min-K %; MUSE's code takes 40 %."""

    share: float = Field(0.4, gt=0, le=1)


@register_metric(
    "privleak", params=PrivLeakParams, source="MUSE (Shi et al. 2024), section 3.3", sets=("forget", "earlier")
)
def privleak(probe: Probe, params: PrivLeakParams) -> Measured:
    """(AUC − AUC of the reference model) / AUC of the reference model, in percent; 0 is ideal.

    The AUC is that of the Min-K % scores with the holdout as members, as in MUSE's code: below 0 the records still
    look trained on, above 0 they look stranger than what was never seen.
    """
    reference = probe.references.first
    if reference is None:
        return Measured.missing(probe.references.reason)
    if probe.holdout is None or reference.holdout is None:
        return Measured.missing(NO_HOLDOUT)
    found = []
    for records, holdout in ((probe, probe.holdout), (reference, reference.holdout)):
        forget, others = _scores(records, params.share), _scores(holdout, params.share)
        if forget.value is None or others.value is None:
            return Measured.missing(forget.reason or others.reason)
        found.append(auc(list(others.per_record.values()), list(forget.per_record.values())))
    own, honest = found
    if honest == 0:
        return Measured.missing("the reference model's AUC is 0, and it is what is divided by")
    return Measured((own - honest) / honest * 100).with_parts(auc=own, auc_reference=honest)


def _scores(probe: Probe, share: float) -> Measured:
    return probe.once(
        f"min_k {share}",
        lambda: Measured.mean(probe.records.ids, [lowest_share(logs, share) for logs in probe.scores.token_log_probs]),
    )
