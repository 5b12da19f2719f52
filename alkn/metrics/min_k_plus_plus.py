"""Min-K %++ attack: Min-K % with each token measured by what else the model could have said there."""

from __future__ import annotations

from pydantic import Field

from alkn.core.measured import Measured
from alkn.core.privacy import ATTACKED, attacked, lowest_share, standardized_log_probs
from alkn.core.probe import Probe
from alkn.membership import MembershipParams
from alkn.registry import register_metric


class MinKPlusPlusParams(MembershipParams):
    """``share``: of the answer's tokens, those with the lowest standardized log-probability."""

    share: float = Field(0.2, gt=0, le=1)


@register_metric(
    "min_k_plus_plus", params=MinKPlusPlusParams, source="Zhang et al. 2024, equations 3 and 4", sets=ATTACKED
)
def min_k_plus_plus(probe: Probe, params: MinKPlusPlusParams) -> Measured:
    """Mean of the lowest standardized log-probabilities, standard deviations; part ``auc``: against the holdout."""

    def scores(one: Probe) -> Measured:
        values = standardized_log_probs(one.model, one.records.examples)
        return Measured.mean(one.records.ids, [lowest_share(z, params.share) for z in values])

    return attacked(probe, f"min_k_plus_plus {params.share}", scores, **params.model_dump(exclude={"share"}))
