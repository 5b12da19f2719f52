"""Min-K % attack: even the least probable tokens of what was trained on are not that improbable."""

from __future__ import annotations

from pydantic import Field

from alkn.core.measured import Measured
from alkn.core.privacy import ATTACKED, attacked, lowest_share
from alkn.core.probe import Probe
from alkn.membership import MembershipParams
from alkn.registry import register_metric


class MinKParams(MembershipParams):
    """``share``: of the answer's tokens, those with the lowest log-probability."""

    share: float = Field(0.2, gt=0, le=1)


@register_metric("min_k", params=MinKParams, source="Shi et al. 2024, equation 1", sets=ATTACKED)
def min_k(probe: Probe, params: MinKParams) -> Measured:
    """Mean log-probability of the least probable tokens, nats, ≤ 0; part ``auc``: members against the holdout."""

    def scores(one: Probe) -> Measured:
        return Measured.mean(one.records.ids, [lowest_share(logs, params.share) for logs in one.scores.token_log_probs])

    return attacked(probe, f"min_k {params.share}", scores, **params.model_dump(exclude={"share"}))
