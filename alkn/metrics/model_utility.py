"""TOFU's model utility: one number over the utility domains."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.view import View
from alkn.registry import Params, register_metric

PARTS = ("probability", "rouge_l", "truth_ratio")


@register_metric("model_utility", source="after TOFU (Maini et al. 2024), section 2.2.1", scope="model")
def model_utility(view: View, params: Params) -> Measured:
    """Harmonic mean over domains of probability, ROUGE-L recall and truth ratio, never drawn on; in [0, 1].

    TOFU takes P(right) / Σ P(choices) for the probability on real authors and world facts; here it is P everywhere.
    """
    values = []
    for domain, measured in view.under("utility").items():
        for part in PARTS:
            if part not in measured:
                return Measured.missing(f"evaluation.metrics does not name {part}")
            value = measured[part].value
            if value is None:
                return Measured.missing(f"{domain}: {part}: {measured[part].reason}")
            values.append(value)
    if not values:
        return Measured.missing("there is no utility set")
    if min(values) <= 0:
        return Measured(0.0)
    return Measured(len(values) / sum(1 / v for v in values))
