"""Forget quality: can the model be told from one that never saw the records?"""

from __future__ import annotations

import math

from alkn.core.forget_quality import ks_test
from alkn.core.measured import Measured
from alkn.core.probe import Probe
from alkn.core.truth_ratio import TruthRatios, truth_ratios
from alkn.registry import Params, register_metric


@register_metric("forget_quality", source="TOFU (Maini et al. 2024), section 2.2.2", sets=("forget", "earlier"))
def forget_quality(probe: Probe, params: Params) -> Measured:
    """p-value of the Kolmogorov-Smirnov test of the truth ratios against the first reference model's, in (0, 1].

    High: the model cannot be told from the reference. The values of the records are R = P(wrong) / P(right), the
    part ``reference`` has the reference's; ``honest_1``, ... are the p-values of the further references against
    the first: how high an honest model gets.
    """
    probes = list(probe.references.probes.values())
    if not probes:
        return Measured.missing(probe.references.reason)
    own, *honest = [truth_ratios(one.model, one.records) for one in (probe, *probes)]
    reason = next((why for sample in (own, *honest) if (why := _unusable(sample))), "")
    if reason:
        return Measured.missing(reason)
    first, *others = honest
    test = ks_test(own.values, first.values)
    spread = {f"honest_{i}": ks_test(one.values, first.values).p_value for i, one in enumerate(others, 1)}
    return Measured(test.p_value, "", own.per_record).with_parts(
        log10=test.log10_p,
        statistic=test.statistic,
        records=float(len(own.values)),
        reference=Measured.mean(list(first.per_record), first.values),
        **spread,
    )


def _unusable(ratios: TruthRatios) -> str:
    """Why there is no sample to test; empty if there is one."""
    if not ratios.values:
        return "no record has both a paraphrased answer and wrong answers"
    return "" if all(map(math.isfinite, ratios.values)) else "a truth ratio is not a finite number"
