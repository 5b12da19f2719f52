"""Perplexity on text that should still be easy."""

from __future__ import annotations

import math

from alkn.core.measured import Measured
from alkn.core.privacy import log_likelihoods
from alkn.core.probe import Probe
from alkn.registry import Params, register_metric


@register_metric("perplexity", source="Jelinek et al. 1977", sets=("text", "retain", "utility"))
def perplexity(probe: Probe, params: Params) -> Measured:
    """exp(total NLL of the set / its tokens), ≥ 1; the prompt of a record does not count, of plain text all does.

    The value is that of the whole set, each token counting the same; a record's value is that of its own tokens.
    """
    found = log_likelihoods(probe)
    total, tokens = (math.fsum(part) for part in zip(*found.values(), strict=True))
    per_record: dict[int, float] = {}
    try:
        per_record = {number: math.exp(-logs / count) for number, (logs, count) in found.items()}
        value = math.exp(-total / tokens)
    except OverflowError:
        value = math.inf
    if not all(map(math.isfinite, (value, *per_record.values()))):
        return Measured.missing("a value is not a finite number")
    return Measured(value, "", per_record)
