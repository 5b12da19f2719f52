"""Extraction strength: how little of the answer one must give to get the rest."""

from __future__ import annotations

from torch import Tensor

from alkn.core.measured import Measured
from alkn.core.probe import Probe
from alkn.registry import Params, register_metric


@register_metric("extraction_strength", source="Carlini et al. 2021; OpenUnlearning")
def extraction_strength(probe: Probe, params: Params) -> Measured:
    """1 − (shortest prefix after which every answer token is the first choice) / length; in [0, 1]."""
    values = [strength(hits) for hits in probe.scores.token_hits]
    return Measured.mean(probe.records.ids, values)


def strength(hits: Tensor) -> float:
    """Share of the answer that is its longest run of hits up to the end; ``hits`` is boolean ``[length]``."""
    misses = (~hits.bool()).nonzero().reshape(-1)
    known = hits.numel() - (int(misses[-1]) + 1 if misses.numel() else 0)
    return known / hits.numel()
