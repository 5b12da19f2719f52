"""Truth ratio: does the model prefer wrong answers of the same form to the right one?"""

from __future__ import annotations

import torch
from pydantic import Field

from alkn.core.measured import Measured
from alkn.core.probe import Probe
from alkn.core.truth_ratio import Mean, ratio_of_nll
from alkn.registry import Params, register_metric


class TruthRatioParams(Params):
    """``mean``: over the wrong answers' probabilities, see :func:`alkn.core.truth_ratio.ratio_of_nll`."""

    mean: Mean = Field("geometric")


@register_metric(
    "truth_ratio",
    params=TruthRatioParams,
    source="TOFU (Maini et al. 2024), equation 1 and section 2.2.2; prob_mean: OpenUnlearning",
)
def truth_ratio(probe: Probe, params: TruthRatioParams) -> Measured:
    """TOFU's R = P(wrong) / P(paraphrased right), aggregated by what the set is for.

    On a forget set the value is the mean of min(R, 1/R), high when right and wrong look alike; elsewhere the mean of
    max(0, 1 − R), high when the model prefers the truth. Both in [0, 1]. ``prob_mean`` is the mean of
    P(right) / (P(right) + P(wrong)) = 1 / (1 + R) on any set, in (0, 1); 0.5 when right and wrong look alike.

    P(wrong) is the geometric mean over the wrong answers, as in OpenUnlearning and in TOFU's forget quality; the
    paper's formula and TOFU's own aggregation of this score have the arithmetic one (``mean: arithmetic``).
    """
    right, wrong = probe.paraphrase_nll, probe.wrong_nll
    if right is None or wrong is None:
        return Measured.missing("not every record has wrong answers (perturbed_answer)")
    ratio = ratio_of_nll(right, wrong, mean=params.mean)
    if probe.records.name.split("/")[0] in ("forget", "earlier"):
        values = torch.minimum(ratio, 1 / ratio)
    else:
        values = torch.clamp(1 - ratio, min=0)
    bounded = ratio_of_nll(right, wrong, mean=params.mean, form="bounded")
    ids = probe.records.ids
    return Measured.mean(ids, values).with_parts(prob_mean=Measured.mean(ids, bounded))
